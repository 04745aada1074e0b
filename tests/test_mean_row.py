"""The mean row beside the class row, against autograd through the blocks themselves, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
    cut_patch_streams,
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

from hf_lgp.attention_block import AttentionBlock, OtherRows
from hf_lgp.class_path import ClassPath
from hf_lgp.rules import Rule

CHOSEN = torch.tensor([7, 0, 4, 9, 2])
"""Examples of a forward of ten."""

# -- the reference ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one forward leaves for the reference, by block.

    Attributes:
        calls: The block's arguments.
        normalised: Output of its first norm.
        masks: Mask of its attention, added to the scores.
        mixed: Input of its output projection.
        factors: Factors of every call of each of its dropouts, shape ``(b, T, D)``.
        means: Their means over the rows but the first that were not zero before, shape ``(b, 1, D)``.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    normalised: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    factors: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    means: dict[nn.Module, list[Tensor]] = field(default_factory=dict)


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


def attention_of(block: AttentionBlock) -> nn.Module:
    attention = block.module.attention
    assert isinstance(attention, nn.Module)
    return attention


def watched(blocks: list[AttentionBlock], seen: Seen) -> list[RemovableHandle]:
    """Hooks that fill ``seen``; dropout multiplies by factors that it draws for rows of ones, so that they are known."""

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append((args, kwargs))

    def normalised(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.normalised.append(output)

    def attending(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.masks.append(added_mask(args, kwargs))

    def projecting(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.mixed.append(args[0])

    def dropped(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        factor = module.forward(torch.ones_like(args[0]))
        mean = torch.where(args[0] == 0, torch.nan, factor)[:, 1:].nanmean(1, keepdim=True)
        seen.factors.setdefault(module, []).append(factor)
        # What every row had lost before stays lost, whatever its factor.
        seen.means.setdefault(module, []).append(mean.nan_to_num(1.0))
        return args[0] * factor

    handles = []
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(block.norm_before.register_forward_hook(normalised))
        handles.append(attention_of(block).register_forward_pre_hook(attending, with_kwargs=True))
        handles.append(block.output.register_forward_pre_hook(projecting))
        # before the path's own hooks, which are to see the known factors
        handles += [dropout.register_forward_hook(dropped, prepend=True) for dropout in block.dropouts]
    return handles


def averaged_mask(mask: Tensor | None) -> Tensor | None:
    """A mask whose first query row is the mean of the other rows'."""
    return None if mask is None else torch.cat([mask[:, :, 1:].mean(2, keepdim=True), mask[:, :, 1:]], dim=2)


def averaged(block: AttentionBlock, seen: Seen) -> list[RemovableHandle]:
    """Hooks that treat the first row as the mean of the other rows: mean mask row, mean factors of dropout."""

    def attending(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args[:1], {**kwargs, "attention_mask": averaged_mask(added_mask(args, kwargs))}

    def dropped(left: Iterator[Tensor], module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0] * next(left)

    handles = [attention_of(block).register_forward_pre_hook(attending, with_kwargs=True)]
    return handles + [d.register_forward_hook(partial(dropped, iter(seen.means[d]))) for d in block.dropouts]


@dataclass
class Received:
    """What the other rows of a block receive from one row's attention.

    Attributes:
        below: Gradient of the rows as they enter the block, shape ``(b, T - 1, D)``.
        shares: How much that is, every head's two parts by their lengths, shape ``(b, T - 1, 1)``.
    """

    below: Tensor
    shares: Tensor


def received(
    block: AttentionBlock,
    others: Tensor,
    read: Tensor,
    mask: Tensor | None,
    normalised: Tensor,
    mixed: Tensor,
    scores: bool,
) -> Received:
    """What the rows but the first receive from the first row's attention.

    Args:
        block: The block.
        others: The rows but the first that enter it.
        read: What its attention reads: the output of its first norm, first row included.
        mask: Added to the scores.
        normalised: Gradient of the first norm's output.
        mixed: Gradient of the output projection's input.
        scores: Whether the gradient comes through the scores too, not through the values alone.
    """
    others, norm = others.detach().requires_grad_(), block.norm_before
    (below,) = torch.autograd.grad(norm(others), others, normalised[:, 1:])

    def by_head(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    def back(module: nn.Linear, heads: Tensor) -> Tensor:
        """A row of every head, ``(b, H, 1, D / H)``, as rows of the normalised input, ``(b, H, D)``."""
        weight = module.weight.unflatten(0, (block.heads, -1))
        return torch.einsum("bho,hoi->bhi", heads[:, :, 0], weight) * norm.weight

    with torch.no_grad():
        query, keys, values = (by_head(part(read)) for part in (block.query, block.key, block.value))
        query, delta = query[:, :, :1] * block.scaling, by_head(mixed)[:, :, :1]
        logits = query @ keys.mT
        attention = (logits if mask is None else logits + mask[:, :, :1]).softmax(-1)
        slopes = delta @ values.mT
        slopes = attention * (slopes - (attention * slopes).sum(-1, keepdim=True))
        parts = [(attention[:, :, 0, 1:], back(block.value, delta))]
        if scores:
            parts.append((slopes[:, :, 0, 1:], back(block.key, query)))
        summed, lengths = torch.zeros_like(others), torch.zeros_like(others[..., 0])
        for factor, direction in parts:
            summed += torch.einsum("bht,bhi->bti", factor, direction)
            lengths += torch.einsum("bht,bh->bt", factor.abs(), direction.norm(dim=-1))
        # The heads' parts are what autograd says; eager attention rounds.
        torch.testing.assert_close(summed, normalised[:, 1:] * norm.weight, rtol=1e-4, atol=1e-6)
        return Received(below, (lengths / (others.var(-1, correction=0) + norm.eps).sqrt())[..., None])


def mean_row_of(
    block: AttentionBlock, call: tuple[tuple[Any, ...], dict[str, Any]], seen: Seen, weights: Tensor, elsewhere: Tensor
) -> tuple[Tensor, Received]:
    """The mean row through one block: the mean of the rows that enter it, whose attention reads the mean of them normalised.

    Args:
        block: The block.
        call: Its arguments.
        seen: What the forward left.
        weights: Of the other rows in their mean, shape ``(b, T - 1, 1)``.
        elsewhere: Gradient of the mean row that leaves the block.

    Returns:
        ``(losses, received)``: what has the mean row's gradients, shape ``(b,)``; what the other rows receive through the
        values it reads.
    """
    (hidden, *further), kwargs = call
    others, norm, weights = hidden[:, 1:].detach(), block.norm_before, weights / weights.sum(1, keepdim=True)
    rows = torch.cat([(weights * others).sum(1, keepdim=True), others], dim=1)
    mean = (weights * F.layer_norm(others, norm.normalized_shape, eps=norm.eps)).sum(1, keepdim=True)
    found: dict[str, Tensor] = {}
    masks: list[Tensor | None] = []

    def normalised(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found["read"] = torch.cat([mean * norm.weight + norm.bias, output[:, 1:]], dim=1)
        return found["read"]

    handles = averaged(block, seen)
    handles.append(norm.register_forward_hook(normalised))
    handles.append(block.value.register_forward_hook(lambda module, args, output: found.update(values=output)))
    handles.append(block.output.register_forward_pre_hook(lambda module, args: found.update(mixed=args[0])))
    handles.append(
        attention_of(block).register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    )
    with removed(handles):
        output = block.module(rows, *further, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    losses = (output[:, 0] * elsewhere).sum(1)
    values, mixed = torch.autograd.grad(losses.sum(), [found["values"], found["mixed"]], retain_graph=True)
    below = values @ block.value.weight.detach()
    return losses, received(block, others, found["read"], masks[0], below, mixed, scores=False)


def mean_row_losses(blocks: list[AttentionBlock], seen: Seen, losses: Tensor) -> Tensor:
    """Per example, what has the mean row's gradients: in every block but the last its output times what is handed down.

    Handed down is the sum over the other rows of what they receive in later blocks. Those that enter the first block pass on to
    the embeddings what they receive there.
    """
    count = len(blocks)
    gradients = torch.autograd.grad(losses.sum(), seen.normalised + seen.mixed, retain_graph=True)
    total, elsewhere, weights = torch.zeros_like(losses), 0.0, torch.zeros(())
    for index in reversed(range(count)):
        block, call = blocks[index], seen.calls[index]
        hidden = call[0][0]
        normalised, mixed = gradients[index], gradients[count + index]
        read, mask = seen.normalised[index], seen.masks[index]
        parts = [received(block, hidden[:, 1:], read, mask, normalised, mixed, scores=True)]
        if index < count - 1:
            # No other row receives anything where stochastic depth drops all later branches.
            weights = weights + torch.finfo(weights.dtype).tiny
            assert isinstance(elsewhere, Tensor)
            own, more = mean_row_of(block, call, seen, weights, elsewhere)
            total = total + own
            parts.append(more)
            if index == 0:
                total = total + (hidden[:, 1:] * more.below).sum((1, 2))
        elsewhere = elsewhere + sum(part.below.sum(1) for part in parts)
        weights = weights + sum(part.shares for part in parts)
    return total


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
    blocks, seen, data = path.backbone.blocks, Seen(), dict(inputs)
    with cut_patch_streams(model, path), removed(watched(blocks, seen)):
        losses, pullbacks = losses_of(model, data, data.pop("labels"))
    path.disarm()
    queries = {block.query for block in blocks}
    followed = mean_row_losses(blocks, seen, losses)[chosen]
    gradients: list[Gradients] = []
    for loss, mean_row_loss in zip(losses[chosen], followed, strict=True):
        one = by_rule(path.rules, loss)
        other = by_rule(path.rules, mean_row_loss)
        gradients.append(
            [
                mine if rule.module in queries else [a + b for a, b in zip(mine, more, strict=True)]
                for rule, mine, more in zip(path.rules, one, other, strict=True)
            ]
        )
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
    path, everything = path_of(model, mean_row=True), {**(data or batch()), **inputs}
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


# Dinov2's head reads the mean of the patch rows as well: the path follows the class row's half, and the mean row with it.
# BEiT's relative position bias of the mean row is the mean of the other rows'; its table has no rule, so no gradient.
# transformers computes the softmax of eager attention in float32 but for Dinov2
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@families
def test_the_mean_row_is_autograd_through_the_block(family: str, attention: str, tolerance: float) -> None:
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
    """The path that follows the mean row, its gradients by rule, and those of the class row alone."""
    found = []
    for mean_row in (True, False):
        path = path_of(model, mean_row)
        note(path, model, batch())
        found.append(stacked(path))
        path.close()
    return path, *found


@families
def test_one_block_has_no_mean_row(family: str) -> None:
    path, followed, alone = with_and_without(tiny_classifier(family, num_hidden_layers=1))
    for rule, one, other in zip(path.rules, followed, alone, strict=True):
        assert torch.equal(one, other), rule.name


@families
def test_the_last_block_the_queries_and_the_class_token_are_the_class_row_alone(family: str) -> None:
    path, followed, alone = with_and_without(tiny_classifier(family, num_hidden_layers=3))
    backbone, changed = path.backbone, set()
    last = {backbone.norm, *backbone.blocks[-1].module.modules()}
    queries = {block.query for block in backbone.blocks}
    for rule, one, other in zip(path.rules, followed, alone, strict=True):
        if rule.module in last:
            assert torch.equal(one, other), rule.name
            continue
        if rule.parameters[0] is backbone.positions:  # the class token's row, and the others'
            torch.testing.assert_close(one[:, :WIDTH], other[:, :WIDTH], rtol=1e-11, atol=1e-13)
            one, other = one[:, WIDTH:], other[:, WIDTH:]
        if rule.module in queries or rule.parameters[0] is backbone.tokens[0] or rule.name.endswith("mask_token"):
            # The class row beside another one: rounding may differ.
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13, msg=rule.name)
        else:
            assert (one - other).norm() > 1e-3 * other.norm() > 0.0, rule.name
            changed.add(rule.module)
    parts = ("norm_before", "key", "value", "output", "norm_after", "expand", "contract")
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
def test_total_is_the_sum_of_the_rows(examples: int, heads: int, others: int, width: int, seed: int) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generator, eps = torch.Generator().manual_seed(seed), 1e-3
    mixers, directions = randn(examples, 2 * heads, others), randn(examples, 2 * heads, width)
    hidden = randn(examples, others, width).requires_grad_()
    normalised = F.layer_norm(hidden, (width,), eps=eps)
    spread = (hidden.detach().var(-1, correction=0, keepdim=True) + eps).rsqrt()
    rows = OtherRows(mixers, directions, directions @ normalised.detach().mT)
    arriving = mixers.mT @ directions
    (through,) = torch.autograd.grad(normalised, hidden, arriving, retain_graph=True)
    total, sizes = rows.total(normalised.detach(), spread), rows.sizes(spread)
    torch.testing.assert_close(rows.rows(normalised.detach(), spread), through, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total, through.sum(1), rtol=1e-9, atol=1e-9)
    # Written out from the rows: their sum, but for what points along ones and along each row.
    scaled = arriving * spread
    pull = normalised.detach() * (scaled * normalised.detach()).mean(-1, keepdim=True)
    summed = scaled.sum(1)
    torch.testing.assert_close(total, summed - summed.mean(-1, keepdim=True) - pull.sum(1), rtol=1e-9, atol=1e-9)
    assert sizes.shape == (examples, others, 1)
    assert bool((through.norm(dim=-1, keepdim=True) <= sizes * (1 + 1e-9)).all())


# -- what it is for --------------------------------------------------------------------------------------------------------

PROJECTIONS = ("value", "output", "expand", "contract")


def squared_errors(model: Any, data: dict[str, Tensor], mean_row: bool) -> dict[str, float]:
    """Squared errors of path gradients against the model's own by projection, over examples and blocks before the last."""
    path, some, count = path_of(model, mean_row), dict(data), len(data["labels"])
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
def test_the_mean_row_brings_the_path_closer_to_the_gradient(layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "intermediate_size": 32}
    config = ViTConfig(**sizes, num_hidden_layers=layers, num_attention_heads=2, num_labels=3)
    model = ViTForImageClassification(config).double().eval()
    followed, alone = (squared_errors(model, images(6, 0.3), mean_row) for mean_row in (True, False))
    assert sum(followed.values()) < 0.1 * sum(alone.values())  # measured: 0.005 to 0.02
    for name in PROJECTIONS:  # measured: below 0.05, and below 0.2 for what expands
        assert followed[name] < 0.5 * alone[name], name


# -- randomness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RANDOM)
def test_the_mean_row_has_the_mean_of_the_factors_that_were_drawn(name: str, seed: int) -> None:
    model = random_model(name)
    torch.manual_seed(seed)
    (seen,) = compare(model)
    # A block draws for its two branches; the last one has no mean row.
    backbone = path_of(model).backbone
    factors = torch.stack([f for block in backbone.blocks[:-1] for d in block.dropouts for f in seen.factors[d]])
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
    path = path_of(model, mean_row=True)
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
    path = path_of(model, mean_row=True)
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
    path = path_of(model, mean_row=True)
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


@pytest.mark.parametrize("precision", ["autocast", "bfloat16 model"])
@families
def test_bfloat16_is_close(family: str, precision: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3)
    path = path_of(model, mean_row=True)
    note(path, model, batch())
    exact = torch.cat([gradient.sum(0) for gradient in stacked(path)])
    path.close()
    half = model.to(torch.float32 if precision == "autocast" else torch.bfloat16)
    path = path_of(half, mean_row=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        note(path, half, {"pixel_values": batch()["pixel_values"].to(half.dtype)})
    actual = torch.cat([gradient.double().sum(0) for gradient in stacked(path)])
    assert bool(path.finite.all())
    assert (actual - exact).norm() < 0.05 * exact.norm()


# -- what is not finite ----------------------------------------------------------------------------------------------------


@plain_families
def test_an_example_that_is_not_finite_leaves_the_others_alone(family: str) -> None:
    model, spoilt = tiny_classifier(family, num_hidden_layers=3), batch()
    path = path_of(model, mean_row=True)
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
    path = path_of(model, mean_row=True)
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
