"""The mean rows beside the class row, against autograd through followed rows and embeddings, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_class_path import (
    EXAMPLES,
    IN_PARTS,
    RANDOM,
    VARIANTS,
    Gradients,
    assert_same,
    batch,
    families,
    features_of,
    losses_of,
    masked,
    note,
    path_gradients,
    path_of,
    plain_families,
    random_model,
)
from tiny import WIDTH, TinyImages, tiny_classifier
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import ViTConfig, ViTForImageClassification

from hf_lgp.asked_rows import Asked, AskedRows
from hf_lgp.attention_block import AttentionBlock
from hf_lgp.class_path import ClassPath, contrasts
from hf_lgp.rules import Rule

CHOSEN = torch.tensor([7, 0, 4, 9, 2])
"""Examples of a forward of ten."""

# -- the reference ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one forward leaves for the reference, by block.

    Attributes:
        entering: Rows that enter the block.
        masks: Mask of its attention, added to the scores.
        factors: Factors of every call of each of its dropouts on the class row and, as a mean over those rows that were not zero
            before, on the others, shape ``(b, 2, D)``.
        leaving: Class row that leaves the last block.
    """

    entering: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    factors: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    drawn: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    leaving: list[Tensor] = field(default_factory=list)


@contextmanager
def removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that an attention module is called with, as something to add to scores, shape ``(b, h, T, T)``."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return mask.detach().expand(-1, -1, mask.shape[-1], -1)


def watched(blocks: list[AttentionBlock], seen: Seen) -> list[RemovableHandle]:
    """Hooks that fill ``seen``; dropout multiplies by factors that it draws for rows of ones, so that they are known."""

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.entering.append(args[0])

    def attending(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.masks.append(added_mask(args, kwargs))

    def dropped(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        factor = module.forward(torch.ones_like(args[0]))
        # What every row had lost before stays lost, whatever its factor.
        mean = torch.where(args[0] == 0, torch.nan, factor)[:, 1:].nanmean(1, keepdim=True).nan_to_num(1.0)
        seen.drawn.setdefault(module, []).append(factor)
        seen.factors.setdefault(module, []).append(torch.cat([factor[:, :1], mean], dim=1).detach())
        return args[0] * factor

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.leaving.append((output[0] if isinstance(output, tuple) else output)[:, 0])

    handles = [blocks[-1].module.register_forward_hook(left)]
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(block.module.attention.register_forward_pre_hook(attending, with_kwargs=True))
        # before the path's own hooks, which are to see the known factors
        handles += [dropout.register_forward_hook(dropped, prepend=True) for dropout in block.dropouts]
    return handles


def groups_of(rows: Tensor) -> Tensor:
    """Which of four means stands for each of the rows of every example, one-hot: by the signs of two contrasts."""
    chosen = torch.zeros(*rows.shape[:2], 4, dtype=rows.dtype)
    for example, own in enumerate(rows):
        index = torch.zeros(len(own), dtype=torch.long)
        for place, pattern in zip((2, 1), contrasts(len(own)).double(), strict=True):
            direction = sum(sign * row for sign, row in zip(pattern - pattern.mean(), own, strict=True))
            along = own @ direction
            index += place * (along <= along.mean())
        chosen[example, torch.arange(len(own)), index] = 1.0
    return chosen


@dataclass
class Below:
    """What the walk through one block leaves.

    Attributes:
        losses: What has the parameters' gradients, shape ``(b,)``.
        own: Gradient of the class row that enters, shape ``(b, 1, D)``.
        means: Gradients of the mean rows that enter, but for their attention, shape ``(b, K, D)``.
        others: Gradient of the other rows that enter, but for what goes through their means' own rows, shape ``(b, T - 1, D)``.
        sizes: Bound on the size of ``others``, shape ``(b, T - 1, 1)``.
    """

    losses: Tensor
    own: Tensor
    means: Tensor
    others: Tensor
    sizes: Tensor


def walk(block: AttentionBlock, seen: Seen, index: int, shares: Tensor, arriving: Tensor) -> Below:
    """A block's class row and means of its other rows, their queries on all rows' keys and values, by autograd.

    Args:
        block: The block.
        seen: What the forward left.
        index: The block's position.
        shares: Weights of the other rows in their means, shape ``(b, T - 1, K)``.
        arriving: Gradients of the rows that leave, class row first, shape ``(b, 1 + K, D)``.
    """
    hidden, mask, norm = seen.entering[index].detach(), seen.masks[index], block.norm_before
    count = shares.shape[2]

    def normalise(rows: Tensor) -> Tensor:
        return F.layer_norm(rows, norm.normalized_shape, eps=norm.eps)

    def by_head(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    def of_followed(pair: Tensor, dim: int) -> Tensor:
        own, mean = pair.split(1, dim)
        return torch.cat([own, *[mean] * count], dim)

    def branch(call: int, rows: Tensor) -> Tensor:
        for dropout in block.dropouts:
            if dropout in seen.factors:
                rows = rows * of_followed(seen.factors[dropout][call], 1)
        return rows if block.scales is None else rows * block.scales[call]

    own, others = hidden[:, :1].clone().requires_grad_(), normalise(hidden[:, 1:]).requires_grad_()
    means = (shares.mT @ hidden[:, 1:]).requires_grad_()
    normalised = (shares.mT @ others).detach().requires_grad_()
    asking, read = (torch.cat([normalise(own), rows], dim=1) * norm.weight + norm.bias for rows in (normalised, others))
    query, key, value = by_head(block.query(asking)), by_head(block.key(read)), by_head(block.value(read))
    scores = query @ key.mT * block.scaling
    if mask is not None:
        scores = scores + of_followed(torch.cat([mask[:, :, :1], mask[:, :, 1:].mean(2, keepdim=True)], dim=2), 2)
    attention = scores.softmax(-1)
    mixed = attention @ value
    middle = torch.cat([own, means], dim=1) + branch(0, block.output(mixed.transpose(1, 2).flatten(2)))
    leaving = middle + branch(1, block.contract(block.activation(block.expand(block.norm_after(middle)))))
    losses = (leaving * arriving).sum((1, 2))
    wanted = [own, means, normalised, others, scores, mixed]
    below = torch.autograd.grad(losses.sum(), wanted, retain_graph=True)
    with torch.no_grad():

        def lengths(module: nn.Linear, heads: Tensor) -> Tensor:
            """Lengths of rows of every head seen from the normalised rows, shape ``(b, H, S)``."""
            weight = module.weight.unflatten(0, (block.heads, -1))
            return (torch.einsum("bhso,hoi->bhsi", heads, weight) * norm.weight).norm(dim=-1)

        parts = [
            (below[4], lengths(block.key, query * block.scaling)),
            (attention, lengths(block.value, below[5])),
        ]
        sizes = sum(torch.einsum("bhst,bhs->bt", factor.abs(), length) for factor, length in parts)[:, 1:]
        sizes = sizes + (shares * below[2].norm(dim=-1)[:, None]).sum(-1)
        sizes = sizes / (hidden[:, 1:].var(-1, correction=0) + norm.eps).sqrt()
    rows = hidden[:, 1:].clone().requires_grad_()
    (through,) = torch.autograd.grad(normalise(rows), rows, below[3] + shares @ below[2])
    return Below(losses, below[0], below[1], through, sizes[..., None])


def path_losses(path: ClassPath, seen: Seen, pullbacks: Tensor) -> Tensor:
    """Per example, what has the path's gradients: of every block, its followed rows times what arrives at them."""
    backbone = path.backbone
    row = seen.leaving[0].detach().requires_grad_()
    left = (row if backbone.norm is None else backbone.norm(row)) * pullbacks[:, : row.shape[1]]
    total = left.sum(1)
    (delta,) = torch.autograd.grad(total.sum(), row, retain_graph=True)
    last = len(backbone.blocks) - 1
    embedded = seen.entering[0]
    first = backbone.blocks[0].norm_before
    groups = groups_of(F.layer_norm(seen.entering[min(1, last)].detach()[:, 1:], first.normalized_shape, eps=first.eps))
    weights, elsewhere = torch.zeros_like(embedded[:, 1:, :1]), torch.zeros_like(embedded[:, :4])
    shares, below = groups[..., :0], None
    for index in reversed(range(last + 1)):
        arriving = delta[:, None]
        if index < last:
            # No other row receives anything where stochastic depth drops all later branches.
            shares = (weights + torch.finfo(weights.dtype).tiny) * groups
            shares = (shares / shares.sum(1, keepdim=True)).nan_to_num(0.0)
            arriving = torch.cat([arriving, elsewhere], dim=1)
        below = walk(backbone.blocks[index], seen, index, shares.detach(), arriving)
        total = total + below.losses
        delta = below.own[:, 0]
        elsewhere = groups.mT @ below.others + (below.means if index < last else 0.0)
        weights = weights + below.sizes
    assert below is not None
    others = below.others + shares @ below.means
    return total + (embedded * torch.cat([delta[:, None], others], dim=1).detach()).sum((1, 2))


def by_rule(rules: list[Rule], loss: Tensor) -> Gradients:
    """Autograd's gradients, zero where the loss does not depend on a parameter."""
    parameters = [parameter for rule in rules for parameter in rule.parameters]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad(loss, parameters, **options))
    return [[next(found) for _ in rule.parameters] for rule in rules]


def reference(model: Any, path: ClassPath, inputs: dict[str, Any], chosen: Tensor | slice) -> tuple[Tensor, Any, Seen]:
    """One forward, which an armed path notes.

    Returns:
        ``(pullbacks, gradients, seen)`` with the path's gradients of every chosen example.
    """
    seen, data = Seen(), dict(inputs)
    with removed(watched(path.backbone.blocks, seen)):
        _, pullbacks = losses_of(model, data, data.pop("labels"))
    path.disarm()
    gradients = [by_rule(path.rules, loss) for loss in path_losses(path, seen, pullbacks)[chosen]]
    return pullbacks[chosen], gradients, seen


def compare(
    model: Any,
    tolerance: float = 1e-10,
    *,
    parts: tuple[slice, ...] = (slice(0, EXAMPLES),),
    chosen: Tensor | slice = slice(None),
    data: dict[str, Any] | None = None,
    **inputs: Any,
) -> list[Seen]:
    """Check every example's path gradients and a weighted sum of them, in one and the same forward.

    Args:
        model: The model.
        tolerance: Largest relative error.
        parts: Slices of the examples that run one after the other.
        chosen: Which examples of a forward are noted.
        data: The model's inputs, if not the usual ones.
        inputs: Further inputs of the model.

    Returns:
        What each of the forwards left.
    """
    path, everything = path_of(model, mean_rows=True), {**(data or batch()), **inputs}
    path.start(EXAMPLES)
    results = {}
    for part in parts:
        some = everything
        if len(parts) > 1:
            some = {name: value[part] if isinstance(value, Tensor) else value for name, value in everything.items()}
        path.arm(part, chosen)
        results[part.start] = reference(model, path, some, chosen)
    ordered = [results[start] for start in sorted(results)]
    expected = [gradients for result in ordered for gradients in result[1]]
    terms = path.gradients(torch.cat([pullbacks for pullbacks, _, _ in ordered]))
    path.close()
    assert bool(path.finite.all())
    for example in range(EXAMPLES):
        assert_same(path.rules, path_gradients(path.rules, terms, example), expected[example], tolerance)
    weights = torch.rand(EXAMPLES, dtype=torch.float64) - 0.3
    for index, (rule, term) in enumerate(zip(path.rules, terms, strict=True)):
        if term is None:
            continue
        columns = zip(*(gradients[index] for gradients in expected), strict=True)
        summed = [torch.tensordot(weights, torch.stack(column), 1) for column in columns]
        assert_same([rule], [term.total(weights)], [summed], tolerance)
    return [seen for _, _, seen in ordered]


# -- against the reference -------------------------------------------------------------------------------------------------


# Dinov2's head reads the mean of the patch rows as well: the path follows the class row's half, and the mean rows with it.
# BEiT's relative position bias of the mean rows is the mean of the other rows'; its table has no rule, so no gradient.
# transformers computes the softmax of eager attention in float32 but for Dinov2
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@families
def test_the_mean_rows_are_autograd_through_the_followed_rows(family: str, attention: str, tolerance: float) -> None:
    compare(tiny_classifier(family, num_hidden_layers=3, attn_implementation=attention), tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    family, overrides = VARIANTS[name]
    compare(tiny_classifier(family, num_hidden_layers=3, **overrides))


@pytest.mark.parametrize(("family", "frozen"), [("vit", "bias"), ("dinov2", "norm"), ("beit", "lambda")])
def test_frozen_parameters(family: str, frozen: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3)
    for name, parameter in model.named_parameters():
        if frozen in name and "classifier" not in name and not ("norm" in name and frozen == "bias"):
            parameter.requires_grad_(False)
    compare(model)


@pytest.mark.parametrize(("family", "patch", "rows"), [("vit", 8, 1), ("dinov2", 8, 1), ("deit", 8, 2)])
def test_groups_without_rows(family: str, patch: int, rows: int) -> None:
    model = tiny_classifier(family, num_hidden_layers=3, patch_size=patch)
    seen = compare(model)
    entering = seen[0].entering[1].detach()[:, 1:]
    assert entering.shape[1] == rows
    assert bool((groups_of(entering).sum(1) == 0).any()), "a mean stands for nothing"


HIDDEN = ((0, 1), (0, 2), (1, 2), (3, 4))


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@plain_families
def test_masked_rows(family: str, attention: str, tolerance: float) -> None:
    model = tiny_classifier(family, num_hidden_layers=3, attn_implementation=attention)
    compare(model, tolerance, **masked(model, *HIDDEN))
    compare(model, tolerance, **masked(model, *HIDDEN), parts=IN_PARTS)


@plain_families
def test_a_mask_that_all_rows_share(family: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3)
    mask = masked(model, *HIDDEN)["attention_mask"].bool()
    compare(model, attention_mask=mask[:, None, None])


# -- where it changes nothing ----------------------------------------------------------------------------------------------


def random_pullbacks() -> Tensor:
    return torch.randn(EXAMPLES, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def each_of(path: ClassPath) -> list[Gradients]:
    """Gradients of every example, for fixed pullbacks."""
    terms = path.gradients(random_pullbacks())
    return [path_gradients(path.rules, terms, example) for example in range(EXAMPLES)]


def stacked(path: ClassPath) -> list[Tensor]:
    """The same by rule: all parameters' gradients of all examples."""
    examples = each_of(path)
    return [
        torch.stack([torch.cat([g.flatten() for g in gradients[index]]) for gradients in examples])
        for index in range(len(path.rules))
    ]


def with_and_without(model: Any) -> tuple[ClassPath, list[Tensor], list[Tensor]]:
    """The path that follows the mean rows, its gradients by rule, and those of the class row alone."""
    found = []
    for mean_rows in (True, False):
        path = path_of(model, mean_rows)
        note(path, model, batch())
        found.append(stacked(path))
        path.close()
    return path, *found


@families
def test_one_block_has_no_mean_rows(family: str) -> None:
    path, followed, alone = with_and_without(tiny_classifier(family, num_hidden_layers=1))
    for rule, one, other in zip(path.rules, followed, alone, strict=True):
        assert torch.equal(one, other), rule.name


@families
def test_the_last_block_is_the_class_row_alone(family: str) -> None:
    path, followed, alone = with_and_without(tiny_classifier(family, num_hidden_layers=3))
    backbone, changed = path.backbone, set()
    last = {backbone.norm, *backbone.blocks[-1].module.modules()}
    for rule, one, other in zip(path.rules, followed, alone, strict=True):
        if rule.module in last:
            assert torch.equal(one, other), rule.name
        elif not rule.name.endswith("mask_token"):
            assert (one - other).norm() > 1e-3 * other.norm() > 0.0, rule.name
            changed.add(rule.module)
    parts = ("norm_before", "query", "key", "value", "output", "norm_after", "expand", "contract")
    assert changed >= {getattr(block, part) for block in backbone.blocks[:-1] for part in parts}


# -- what is handed down ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    examples=st.integers(1, 4),
    heads=st.integers(1, 3),
    others=st.integers(1, 6),
    width=st.integers(2, 9),
    seed=st.integers(0, 2**31),
)
def test_totals_are_sums_of_the_rows(examples: int, heads: int, others: int, width: int, seed: int) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generator, eps = torch.Generator().manual_seed(seed), 1e-3
    mixers, directions = randn(examples, 2 * heads, others), randn(examples, 2 * heads, width)
    hidden = randn(examples, others, width).requires_grad_()
    normalised = F.layer_norm(hidden, (width,), eps=eps)
    spread = (hidden.detach().var(-1, correction=0, keepdim=True) + eps).rsqrt()
    halves = zip(
        *(part.chunk(2, dim=1) for part in (mixers, directions, directions @ normalised.detach().mT)), strict=True
    )
    rows = AskedRows(tuple(Asked(*half) for half in halves))
    arriving = mixers.mT @ directions
    (through,) = torch.autograd.grad(normalised, hidden, arriving, retain_graph=True)
    groups = torch.eye(3, dtype=torch.float64)[torch.randint(0, 3, (examples, others), generator=generator)]
    totals, sizes = rows.totals(normalised.detach(), spread, groups), rows.sizes(spread)
    torch.testing.assert_close(rows.rows(normalised.detach(), spread), through, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(totals, groups.mT @ through, rtol=1e-9, atol=1e-9)
    assert sizes.shape == (examples, others, 1)
    assert bool((through.norm(dim=-1, keepdim=True) <= sizes * (1 + 1e-9)).all())


# -- what it is for --------------------------------------------------------------------------------------------------------

PROJECTIONS = ("query", "key", "value", "output", "expand", "contract")


def squared_errors(model: Any, data: dict[str, Tensor], mean_rows: bool) -> dict[str, float]:
    """Squared errors of path gradients against the model's own by projection, over examples and blocks before the last."""
    path, some, count = path_of(model, mean_rows), dict(data), len(data["labels"])
    path.start(count)
    path.arm(slice(0, count))
    losses, pullbacks = losses_of(model, some, some.pop("labels"))
    path.disarm()
    terms = path.gradients(pullbacks)
    path.close()
    owners = {getattr(block, name): name for block in path.backbone.blocks[:-1] for name in PROJECTIONS}
    kept = [index for index, rule in enumerate(path.rules) if rule.module in owners]
    rules, errors = [path.rules[index] for index in kept], dict.fromkeys(PROJECTIONS, 0.0)
    for example, loss in enumerate(losses):
        mine = path_gradients(rules, [terms[index] for index in kept], example)
        for rule, one, other in zip(rules, mine, by_rule(rules, loss), strict=True):
            errors[owners[rule.module]] += sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    assert len(rules) == len(PROJECTIONS) * (len(path.backbone.blocks) - 1)
    return errors


def images(count: int, variation: float) -> dict[str, Tensor]:
    """Images of one repeated patch each, with ``variation`` times as much noise."""
    generator = torch.Generator().manual_seed(5)
    patch, noise = (torch.randn(count, 1, n, n, generator=generator, dtype=torch.float64) for n in (2, 8))
    labels = torch.randint(0, 3, (count,), generator=generator)
    return {"pixel_values": patch.repeat(1, 1, 4, 4) + variation * noise, "labels": labels}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layers", [3, 4])
def test_the_mean_rows_bring_the_path_closer_to_the_gradient(layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "intermediate_size": 32}
    config = ViTConfig(**sizes, num_hidden_layers=layers, num_attention_heads=2, num_labels=3)
    model = ViTForImageClassification(config).double().eval()
    followed, alone = (squared_errors(model, images(6, 0.3), mean_rows) for mean_rows in (True, False))
    assert sum(followed.values()) < 0.1 * sum(alone.values())  # measured: 0.005 to 0.02
    for name in PROJECTIONS:  # measured: below 0.05, and below 0.2 for what expands
        assert followed[name] < 0.5 * alone[name], name


# -- randomness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RANDOM)
def test_the_mean_rows_have_the_mean_of_the_factors_that_were_drawn(name: str, seed: int) -> None:
    model = random_model(name)
    torch.manual_seed(seed)
    (seen,) = compare(model)
    # A block draws for its two branches; the last one has no mean rows.
    backbone = path_of(model).backbone
    factors = torch.stack([f for block in backbone.blocks[:-1] for d in block.dropouts for f in seen.drawn[d]])
    assert bool((factors == 0).any()) and bool((factors > 1).any()), "something is dropped"
    if name.startswith("stochastic depth"):
        assert torch.equal(factors, factors[:, :, :1, :1].expand_as(factors)), "an example's rows share a factor"


@pytest.mark.parametrize("name", ["dropout, ViT", "stochastic depth, BEiT", "stochastic depth, Dinov2"])
def test_factors_of_parts_and_of_chosen_examples(name: str) -> None:
    model = random_model(name)
    compare(model, parts=IN_PARTS)
    compare(model, data=TinyImages(10).batch(0, 10), chosen=CHOSEN)


# -- noting rows -----------------------------------------------------------------------------------------------------------


def assert_each(actual: list[Gradients], expected: list[Gradients]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@families
def test_chosen_examples_of_a_forward(family: str) -> None:
    model, pixels = tiny_classifier(family, num_hidden_layers=3), TinyImages(10).pixels
    path = path_of(model, mean_rows=True)
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES), CHOSEN)
    with torch.no_grad():
        model(pixels)
    path.disarm()
    actual = each_of(path)
    note(path, model, {"pixel_values": pixels[CHOSEN]})
    assert_each(actual, each_of(path))


@families
def test_slices_of_a_micro_batch(family: str) -> None:
    model, pixels = tiny_classifier(family, num_hidden_layers=3), batch()["pixel_values"]
    path = path_of(model, mean_rows=True)
    note(path, model, {"pixel_values": pixels})
    expected = each_of(path)
    path.start(EXAMPLES)
    for part in IN_PARTS:
        path.arm(part)
        with torch.no_grad():
            model(pixels[part])
    path.disarm()
    assert_each(each_of(path), expected)


@pytest.mark.parametrize("control", [slice(0, 2), slice(3, EXAMPLES)])
@plain_families
def test_a_prediction_pass_and_control_rows_share_a_micro_batch(family: str, control: slice) -> None:
    model, pixels = tiny_classifier(family, num_hidden_layers=3), batch()["pixel_values"]
    path = path_of(model, mean_rows=True)
    note(path, model, {"pixel_values": pixels})
    expected = each_of(path)
    rest = slice(2, EXAMPLES) if control.start == 0 else slice(0, 3)
    assert features_of(path, {"pixel_values": pixels[rest]}, rest) is not None
    path.arm(control)
    model(pixels[control])
    path.disarm()
    assert_each(each_of(path), expected)


@plain_families
def test_masked_rows_in_one_of_two_forwards(family: str) -> None:
    # The examples of the first slice have nothing hidden: that forward has no mask at all.
    model = tiny_classifier(family, num_hidden_layers=3)
    for parts in (IN_PARTS, IN_PARTS[::-1]):
        seen = compare(model, **masked(model, (0, 1), (0, 2), (1, 2)), parts=parts)
        assert [mask is None for forward in seen for mask in forward.masks[:1]] == [False, True]


@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "float16"])
@families
def test_half_precision_is_close(family: str, precision: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3)
    path = path_of(model, mean_rows=True)
    note(path, model, batch())
    exact = torch.cat([gradient.sum(0) for gradient in stacked(path)])
    path.close()
    half = model.to(torch.float32 if precision == "autocast" else getattr(torch, precision))
    path = path_of(half, mean_rows=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        note(path, half, {"pixel_values": batch()["pixel_values"].to(half.dtype)})
    actual = torch.cat([gradient.double().sum(0) for gradient in stacked(path)])
    assert bool(path.finite.all())
    assert (actual - exact).norm() < 0.05 * exact.norm()


# -- what is not finite ----------------------------------------------------------------------------------------------------


@plain_families
def test_an_example_that_is_not_finite_leaves_the_others_alone(family: str) -> None:
    model, spoilt = tiny_classifier(family, num_hidden_layers=3), batch()
    path = path_of(model, mean_rows=True)
    note(path, model, spoilt)
    expected = stacked(path)
    spoilt["pixel_values"] = spoilt["pixel_values"].clone()
    spoilt["pixel_values"][1, 0, 3, 3] = torch.nan
    note(path, model, spoilt)
    kept = torch.tensor([0, 2, 3, 4])
    for one, other in zip(stacked(path), expected, strict=True):
        torch.testing.assert_close(one[kept], other[kept], rtol=1e-10, atol=1e-13)
    assert path.finite.tolist() == [True, False, True, True, True]


@plain_families
def test_rows_that_share_no_key_have_a_mean_all_the_same(family: str) -> None:
    # Every row reads itself alone, or with the class row: no key is left that all the other rows read.
    model = tiny_classifier(family, num_hidden_layers=3)
    rows = model.base_model.embeddings.position_embeddings.shape[1]
    mask = torch.eye(rows, dtype=torch.bool).repeat(EXAMPLES, 1, 1, 1)
    mask[:, :, 0] = True
    path = path_of(model, mean_rows=True)
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES))
    with torch.no_grad():
        model(batch()["pixel_values"], attention_mask=mask)
    path.disarm()
    for term in path.gradients(random_pullbacks()):
        if term is not None:
            totals = term.total(torch.ones(EXAMPLES, dtype=torch.float64))
            assert all(bool(part.isfinite().all()) for part in (*totals, term.factors(slice(None)).dense()))
    assert bool(path.finite.all())
