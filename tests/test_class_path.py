"""The class-token path against autograd with the patch streams cut between blocks, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASS_TOKEN_FAMILIES, WIDTH, TinyImages, tiny_classifier
from torch import Tensor, nn

from hf_lgp.class_path import ClassPath, same_features
from hf_lgp.families import find_backbone
from hf_lgp.path_terms import PathTerm
from hf_lgp.prediction_pass import PredictionPass, attend, through_block
from hf_lgp.rules import Rule, trunk_rules

EXAMPLES = 5
families = pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
plain_families = pytest.mark.parametrize("family", ["vit", "deit"])


def batch(seed_offset: int = 0) -> dict[str, Tensor]:
    return TinyImages(2 * EXAMPLES).batch(seed_offset, seed_offset + EXAMPLES)


def path_of(model: Any, mean_rows: bool = False) -> ClassPath:
    backbone = find_backbone(model)
    assert backbone is not None
    return ClassPath(backbone, trunk_rules(model, model.classifier), mean_rows=mean_rows)


@contextmanager
def cut_patch_streams(model: Any, path: ClassPath) -> Iterator[None]:
    """What the path defines: rows other than the class row enter every block but the first as constants."""

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = torch.cat([args[0][:, :1], args[0][:, 1:].detach()], dim=1)
        return (hidden, *args[1:]), kwargs

    def reading(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.cat([args[0][:, :WIDTH], args[0][:, WIDTH:].detach()], dim=1),)

    blocks = path.backbone.blocks[1:]
    handles = [block.module.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles.append(model.classifier.register_forward_pre_hook(reading))
    yield
    for handle in handles:
        handle.remove()


Gradients = list[list[Tensor]]
"""Gradients by rule, of every parameter of the rule."""


def autograd_gradients(rules: list[Rule], loss: Tensor) -> Gradients:
    return [
        list(torch.autograd.grad(loss, rule.parameters, retain_graph=True, allow_unused=True, materialize_grads=True))
        for rule in rules
    ]


def path_gradients(rules: list[Rule], terms: list[PathTerm | None], example: int) -> Gradients:
    """One example's gradients from the terms' factors, zero where the path does not reach."""
    gradients = []
    for rule, term in zip(rules, terms, strict=True):
        if term is None:
            gradients.append([torch.zeros_like(p) for p in rule.parameters])
        else:
            gradients.append(rule.gradients(term.factors(slice(example, example + 1)).dense()[0]))
    return gradients


def assert_same(rules: list[Rule], actual: Gradients, expected: Gradients, tolerance: float) -> None:
    for rule, mine, theirs in zip(rules, actual, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            error = (one.view(other.shape) - other).norm()
            # The floor is for key biases: softmax is blind to them and their gradient is rounding.
            assert error <= tolerance * max(5e-2, float(other.norm())), f"{rule.name}: {error} of {other.norm()}"


def losses_of(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per-example losses, and their gradients with respect to the head's input."""
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits, labels, reduction="none")
    (residuals,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    return losses, residuals @ model.classifier.weight.detach()


def compare(
    model: Any,
    tolerance: float = 1e-10,
    *,
    path: ClassPath | None = None,
    cut: bool = True,
    parts: tuple[slice, ...] = (slice(0, EXAMPLES),),
    **inputs: Any,
) -> list[PathTerm | None]:
    """Check every example's path gradients and a weighted sum of them against autograd, in one and the same forward.

    Args:
        model: The model.
        tolerance: Largest relative error.
        path: The model's path; None to make one and close it.
        cut: Whether autograd sees patch streams as constants.
        parts: Slices of the examples that run one after the other.
        inputs: Further inputs of the model.
    """
    own, data = path or path_of(model), {**batch(), **inputs}
    results = {}
    own.start(EXAMPLES)
    with cut_patch_streams(model, own) if cut else nullcontext():
        for part in parts:
            own.arm(part)
            some = {name: value[part] if isinstance(value, Tensor) else value for name, value in data.items()}
            results[part.start] = losses_of(model, some, some.pop("labels"))
    own.disarm()
    losses, pullbacks = (torch.cat([results[start][k] for start in sorted(results)]) for k in range(2))
    terms, weights = own.gradients(pullbacks), torch.rand(EXAMPLES, dtype=torch.float64) - 0.3
    assert bool(own.finite.all())
    for example in range(EXAMPLES):
        expected = autograd_gradients(own.rules, losses[example])
        assert_same(own.rules, path_gradients(own.rules, terms, example), expected, tolerance)
    reached = [(rule, term) for rule, term in zip(own.rules, terms, strict=True) if term is not None]
    expected = autograd_gradients([rule for rule, _ in reached], weights @ losses)
    assert_same([rule for rule, _ in reached], [term.total(weights) for _, term in reached], expected, tolerance)
    if path is None:
        own.close()
    return terms


# transformers computes the softmax of eager attention in float32 but for Dinov2
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@families
def test_path_is_the_gradient_with_patch_streams_cut(family: str, attention: str, tolerance: float) -> None:
    model = tiny_classifier(family, num_hidden_layers=3, attn_implementation=attention)
    terms = compare(model, tolerance)
    rules = trunk_rules(model, model.classifier)
    unreached = {rule.name for rule, term in zip(rules, terms, strict=True) if term is None}
    assert unreached <= {"dinov2.embeddings.mask_token"}, "every tensor that takes part is reached"


@families
def test_path_of_one_block_is_the_exact_gradient(family: str) -> None:
    # Dinov2's head also reads the mean of the patch rows: the path is the gradient of the class row's half.
    compare(tiny_classifier(family, num_hidden_layers=1), cut=family == "dinov2")


def test_path_of_several_blocks_leaves_something_out() -> None:
    with pytest.raises(AssertionError, match="vit"):
        compare(tiny_classifier("vit"), cut=False)


@families
def test_gains_of_zero_leave_all_but_their_own_norms_gradient_as_it_is(family: str) -> None:
    model = tiny_classifier(family)
    path = path_of(model)
    norm = path.backbone.blocks[1].norm_before
    with torch.no_grad():
        norm.weight[::2] = 1e-6
    note(path, model, batch())
    almost = totals(path)
    with torch.no_grad():
        norm.weight[::2] = 0.0
    note(path, model, batch())
    own = path.gradients(torch.ones(EXAMPLES, norm.weight.numel(), dtype=torch.float64))[path._by_module[norm]]
    assert own is not None and bool(own.total(torch.ones(EXAMPLES))[0].isfinite().all())
    for one, other in zip(almost, totals(path), strict=True):
        if one.shape != norm.weight.shape:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no query, key and value biases": ("vit", {"qkv_bias": False}),
    "no query, key and value biases, Dinov2": ("dinov2", {"qkv_bias": False}),
    "one head": ("vit", {"num_attention_heads": 1}),
    "other activation and epsilon": ("deit", {"hidden_act": "quick_gelu", "layer_norm_eps": 0.1}),
    "no layer scale": ("beit", {"layer_scale_init_value": 0.0}),
    "no position table": ("beit", {"use_absolute_position_embeddings": False}),
    "position bias shared by blocks": (
        "beit",
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    ),
    "both position biases": ("beit", {"use_shared_relative_position_bias": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    family, overrides = VARIANTS[name]
    compare(tiny_classifier(family, **overrides))


@families
@pytest.mark.parametrize("frozen", ["bias", "norm", "embeddings", "lambda"])
def test_frozen_parameters(family: str, frozen: str) -> None:
    model = tiny_classifier(family)
    for name, parameter in model.named_parameters():
        # A frozen bias leaves its weight's rule; what is frozen as a whole has none. The first block stays: gradients pass it.
        if frozen in name and "classifier" not in name and not ("norm" in name and frozen in ("bias", "weight")):
            parameter.requires_grad_(False)
    compare(model)


def masked(model: Any, *rows: tuple[int, int]) -> dict[str, Any]:
    """Inputs that hide the given ``(example, row)`` from attention."""
    mask = torch.ones(EXAMPLES, model.base_model.embeddings.position_embeddings.shape[1], dtype=torch.long)
    for example, row in rows:
        mask[example, row] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@plain_families
def test_masked_rows(family: str, attention: str) -> None:
    model = tiny_classifier(family, attn_implementation=attention)
    inputs = masked(model, (0, 1), (0, 2), (1, 2), (3, 4))
    tolerance = 1e-5 if attention == "eager" else 1e-10
    compare(model, tolerance, **inputs)
    compare(model, tolerance, **inputs, parts=(slice(2, EXAMPLES), slice(0, 2)))


@pytest.mark.parametrize("parts", [(slice(1, EXAMPLES), slice(0, 1)), (slice(0, 1), slice(1, EXAMPLES))])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_rows_of_a_single_example(attention: str, parts: tuple[slice, ...]) -> None:
    model = tiny_classifier("vit", attn_implementation=attention)
    compare(model, 1e-5, **masked(model, (0, 1), (0, 2), (1, 2)), parts=parts)


@pytest.mark.parametrize("parts", [(slice(2, EXAMPLES), slice(0, 2)), (slice(0, 2), slice(2, EXAMPLES))])
def test_masked_rows_in_one_of_two_forwards(parts: tuple[slice, ...]) -> None:
    model = tiny_classifier("vit")
    path = path_of(model)
    compare(model, path=path, **masked(model, *((example, 2) for example in range(EXAMPLES))))
    compare(model, path=path, **masked(model, (0, 1), (0, 2), (1, 2)), parts=parts)


@pytest.mark.parametrize(
    "size",
    [
        (12, 12),
        pytest.param(  # as many patches in another grid
            (4, 16),
            marks=pytest.mark.xfail(
                strict=True, reason="a table is taken for uninterpolated wherever the number of rows agrees"
            ),
        ),
    ],
)
def test_interpolated_positions(size: tuple[int, int]) -> None:
    pixels = F.interpolate(batch()["pixel_values"], size)
    arguments = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    model = tiny_classifier("vit")
    table = model.vit.embeddings.position_embeddings
    with pytest.raises(AssertionError, match="position_embeddings"):  # the path knows no interpolation
        compare(model, **arguments)
    table.requires_grad_(False)
    compare(model, **arguments)
    path = path_of(model.requires_grad_(True))
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES))
    with torch.no_grad():
        model(**arguments)
    path.disarm()
    terms = path.gradients(torch.ones(EXAMPLES, WIDTH, dtype=torch.float64))
    (position,) = (i for i, rule in enumerate(path.rules) if rule.parameters[0] is table)
    assert terms[position] is None, "no gradient is better than that of other positions"


# -- noting rows -----------------------------------------------------------------------------------------------------------

IN_PARTS = (slice(2, EXAMPLES), slice(0, 2))


def note(path: ClassPath, model: Any, data: dict[str, Tensor]) -> None:
    """Run all examples at once, without a graph."""
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES))
    with torch.no_grad():
        model(data["pixel_values"])
    path.disarm()


def totals(path: ClassPath) -> list[Tensor]:
    """Sums over examples of every term, for fixed pullbacks."""
    generator = torch.Generator().manual_seed(3)
    width = path.backbone.blocks[0].query.in_features
    pullbacks = torch.randn(EXAMPLES, width, generator=generator, dtype=torch.float64)
    terms = path.gradients(pullbacks)
    return [gradient for term in terms if term is not None for gradient in term.total(torch.ones(EXAMPLES))]


@families
def test_prediction_and_control_examples_may_run_one_after_the_other(family: str) -> None:
    compare(tiny_classifier(family), parts=IN_PARTS)


@families
def test_chosen_examples_of_a_forward(family: str) -> None:
    model, chosen = tiny_classifier(family), torch.tensor([7, 0, 4, 9, 2])
    path, pixels = path_of(model), TinyImages(10).pixels
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES), chosen)
    with torch.no_grad():
        model(pixels)
    path.disarm()
    actual = totals(path)
    note(path, model, {"pixel_values": pixels[chosen]})
    for one, other in zip(actual, totals(path), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@families
def test_nothing_is_noted_while_disarmed_and_nothing_survives_a_start(family: str) -> None:
    model, other = tiny_classifier(family), batch(EXAMPLES)
    path = path_of(model)
    note(path, model, batch())
    before = totals(path)
    with torch.no_grad():
        model(other["pixel_values"])
    for one, same in zip(before, totals(path), strict=True):
        assert torch.equal(one, same)
    note(path, model, other)
    assert any((one - moved).norm() > 1e-3 for one, moved in zip(before, totals(path), strict=True))
    note(path, model, batch())
    for one, again in zip(before, totals(path), strict=True):
        assert torch.equal(one, again)


@plain_families
def test_an_example_that_is_not_finite_is_noticed(family: str) -> None:
    model, spoilt = tiny_classifier(family), batch()
    path = path_of(model)
    spoilt["pixel_values"] = spoilt["pixel_values"].clone()
    spoilt["pixel_values"][1, 0, 3, 3] = torch.nan
    for data, finite in ((batch(), True), (spoilt, False), (batch(), True)):
        note(path, model, data)
        totals(path)
        assert bool(path.finite.all()) is finite


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@families
def test_close_removes_every_hook(family: str) -> None:
    model = tiny_classifier(family)
    before = hooks_of(model)
    path = path_of(model)
    assert hooks_of(model) > before
    note(path, model, batch())
    path.close()
    assert hooks_of(model) == before


@pytest.mark.parametrize("precision", ["autocast", "bfloat16 model"])
@families
def test_bfloat16_is_close(family: str, precision: str) -> None:
    model, data = tiny_classifier(family), batch()
    path = path_of(model)
    note(path, model, data)
    exact = totals(path)
    path.close()
    half = model.to(torch.float32 if precision == "autocast" else torch.bfloat16)
    path = path_of(half)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        note(path, half, {"pixel_values": data["pixel_values"].to(half.dtype)})
    # Over all tensors: single ones may be small sums of large terms.
    actual = torch.cat([gradient.double().flatten() for gradient in totals(path)])
    expected = torch.cat([gradient.flatten() for gradient in exact])
    assert (actual - expected).norm() < 0.05 * expected.norm()


# -- randomness ------------------------------------------------------------------------------------------------------------

RANDOM: dict[str, tuple[str, dict[str, float]]] = {
    "dropout, ViT": ("vit", {"hidden_dropout_prob": 0.3}),
    "dropout, DeiT": ("deit", {"hidden_dropout_prob": 0.3}),
    "dropout, BEiT": ("beit", {"hidden_dropout_prob": 0.3}),
    "stochastic depth, BEiT": ("beit", {"drop_path_rate": 0.6}),
    "stochastic depth, Dinov2": ("dinov2", {"drop_path_rate": 0.4}),
    "dropout and stochastic depth, BEiT": ("beit", {"hidden_dropout_prob": 0.3, "drop_path_rate": 0.6}),
}


def random_model(name: str) -> Any:
    """A model in train mode that draws in its blocks alone: embedding dropout falls on all rows and is not noted."""
    family, rates = RANDOM[name]
    model = tiny_classifier(family, num_hidden_layers=3, **rates).train()
    model.base_model.embeddings.dropout.p = 0.0
    pixels = batch()["pixel_values"]
    assert (model(pixels).logits - model(pixels).logits).abs().max() > 1e-3, "it has to draw something"
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RANDOM)
def test_the_path_follows_the_masks_that_were_drawn(name: str, seed: int) -> None:
    model = random_model(name)
    torch.manual_seed(seed)
    compare(model)
    compare(model, parts=IN_PARTS)


@pytest.mark.parametrize("name", RANDOM)
def test_masks_of_an_earlier_micro_batch_are_forgotten(name: str) -> None:
    model = random_model(name)
    path = path_of(model)
    compare(model, path=path)
    compare(model.eval(), path=path)
    compare(model.train(), path=path)


# -- the prediction pass ---------------------------------------------------------------------------------------------------


def head_input(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def features_of(path: ClassPath, inputs: dict[str, Tensor], rows: slice = slice(0, EXAMPLES)) -> Tensor | None:
    path.start(EXAMPLES)
    path.arm(rows)
    with torch.no_grad():
        features = PredictionPass(path.backbone, path).features(inputs)
    path.disarm()
    return features


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@plain_families
def test_features_are_the_head_input(family: str, training: bool, layers: int) -> None:
    model = tiny_classifier(family, num_hidden_layers=layers).train(training)
    path, inputs = path_of(model), {"pixel_values": batch()["pixel_values"]}
    expected = head_input(model, inputs)
    features = features_of(path, inputs)
    assert features is not None
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    path.close()
    with torch.no_grad():
        alone = PredictionPass(path.backbone, None).features(inputs)
    assert alone is not None
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)


@plain_families
def test_the_prediction_pass_notes_what_a_forward_notes(family: str) -> None:
    model, data = tiny_classifier(family, num_hidden_layers=3), batch()
    path = path_of(model)
    note(path, model, data)
    expected = totals(path)
    assert features_of(path, {"pixel_values": data["pixel_values"]}) is not None
    for one, other in zip(totals(path), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@plain_families
def test_a_prediction_pass_in_parts_is_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many examples go through the blocks together as suit the hardware."""
    path, inputs = path_of(tiny_classifier(family, num_hidden_layers=3)), {"pixel_values": batch()["pixel_values"]}
    rows, runs = slice(1, EXAMPLES), []
    module = "hf_lgp.prediction_pass"
    monkeypatch.setattr(f"{module}.through_block", lambda *args: runs.append(1) or through_block(*args))
    some = {"pixel_values": inputs["pixel_values"][rows]}
    assert features_of(path, inputs) is not None
    whole, expected = features_of(path, some, rows), totals(path)
    assert len(runs) == 2 * 2
    for noted in path._kept.values():
        noted[rows] = torch.nan
    monkeypatch.setattr(f"{module}._CPU_ROWS", 1)
    features = features_of(path, some, rows)
    assert len(runs) == 2 * (2 + EXAMPLES - 1)
    torch.testing.assert_close(features, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(totals(path), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [65, 129])
def test_attention_without_a_graph(dtype: torch.dtype, rows: int) -> None:
    query, key, value = torch.randn(3, 2, 3, rows, 8, dtype=torch.float64)
    expected = (query @ key.mT * 0.7).softmax(-1) @ value
    attended = attend(query.to(dtype) * 0.7, key.to(dtype), value.to(dtype))
    assert attended.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)


@plain_families
def test_a_prediction_pass_and_a_control_forward_share_a_micro_batch(family: str) -> None:
    model, pixels = tiny_classifier(family, num_hidden_layers=3), batch()["pixel_values"]
    path = path_of(model)
    note(path, model, {"pixel_values": pixels})
    expected = totals(path)
    assert features_of(path, {"pixel_values": pixels[2:]}, slice(2, EXAMPLES)) is not None
    path.arm(slice(0, 2))
    model(pixels[:2])
    path.disarm()
    for one, other in zip(totals(path), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_features_of_interpolated_positions() -> None:
    model = tiny_classifier("vit")
    inputs = {"pixel_values": F.interpolate(batch()["pixel_values"], (12, 12)), "interpolate_pos_encoding": True}
    features = features_of(path_of(model), inputs)
    assert features is not None
    torch.testing.assert_close(features, head_input(model, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["beit", "dinov2"])
def test_families_whose_blocks_take_more_have_no_prediction_pass(family: str) -> None:
    assert path_of(tiny_classifier(family)).backbone.embed is None


@plain_families
def test_unknown_inputs_need_the_whole_model(family: str) -> None:
    path, pixels = path_of(tiny_classifier(family)), batch()["pixel_values"]
    masks = {"bool_masked_pos": torch.zeros(EXAMPLES, 4, dtype=torch.bool), "attention_mask": torch.ones(EXAMPLES, 5)}
    for name, value in masks.items():
        assert features_of(path, {"pixel_values": pixels, name: value}) is None
    assert features_of(path, {"pixel_values": pixels}) is not None


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@plain_families
def test_dropout_in_the_last_block_needs_the_whole_model(family: str, rate: str) -> None:
    model, inputs = tiny_classifier(family, **{rate: 0.1}), {"pixel_values": batch()["pixel_values"]}
    path = path_of(model)
    for training in (True, False, True):
        model.train(training)
        assert (features_of(path, inputs) is None) is training


@families
def test_the_head_reads_the_class_row(family: str) -> None:
    model = tiny_classifier(family)
    path = path_of(model)
    note(path, model, batch())
    features = head_input(model, {"pixel_values": batch()["pixel_values"]})
    assert path.reads_class_row(features)
    assert not path.reads_class_row(head_input(model, {"pixel_values": batch(EXAMPLES)["pixel_values"]})), "stale rows"
    assert not path.reads_class_row(features[:, : WIDTH - 1]), "too narrow"
    assert not path.reads_class_row(features[:, None]), "of another shape"
    assert not path.reads_class_row(features.roll(1, dims=0)), "of other examples"


def test_a_head_on_pooled_rows_does_not_read_the_class_row() -> None:
    model = tiny_classifier("vit")
    path = path_of(model)
    note(path, model, batch())
    with torch.no_grad():
        rows = model.vit(batch()["pixel_values"]).last_hidden_state
    assert path.reads_class_row(rows[:, 0])
    assert not path.reads_class_row(rows[:, 1:].mean(1))
    assert not path.reads_class_row(rows.mean(1))


def test_same_features_allows_for_rounding_only() -> None:
    features = torch.randn(4, WIDTH)
    assert same_features(features, features.bfloat16().float())
    assert same_features(torch.cat([features, torch.randn(4, 3)], 1), features)
    assert not same_features(features, features + 0.2 * torch.randn(4, WIDTH))
    assert not same_features(features, torch.full_like(features, torch.nan))
