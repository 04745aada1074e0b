"""The class-token path against autograd with the patch streams cut between blocks, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASS_TOKEN_FAMILIES, WIDTH, TinyImages, tiny_classifier
from torch import Tensor, nn

from hf_lgp.class_path import ClassPath, same_features
from hf_lgp.families import find_backbone
from hf_lgp.path_terms import PathTerm
from hf_lgp.rules import Rule, trunk_rules

EXAMPLES = 5
families = pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
plain_families = pytest.mark.parametrize("family", ["vit", "deit"])


def batch(seed_offset: int = 0) -> dict[str, Tensor]:
    return TinyImages(2 * EXAMPLES).batch(seed_offset, seed_offset + EXAMPLES)


def path_of(model: Any) -> ClassPath:
    backbone = find_backbone(model)
    assert backbone is not None
    return ClassPath(backbone, trunk_rules(model, model.classifier))


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
            assert error <= tolerance * max(1e-2, float(other.norm())), f"{rule.name}: {error} of {other.norm()}"


def losses_of(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per-example losses, and their gradients with respect to the head's input."""
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits, labels, reduction="none")
    (residuals,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    return losses, residuals @ model.classifier.weight.detach()


def compare(model: Any, tolerance: float = 1e-10, cut: bool = True, **inputs: Tensor) -> list[PathTerm | None]:
    """Check every example's path gradients and a weighted sum of them against autograd, in one and the same forward."""
    path, data = path_of(model), batch()
    data.update(inputs)
    labels = data.pop("labels")
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES))
    if cut:
        with cut_patch_streams(model, path):
            losses, pullbacks = losses_of(model, data, labels)
    else:
        losses, pullbacks = losses_of(model, data, labels)
    path.disarm()
    terms, weights = path.gradients(pullbacks), torch.rand(EXAMPLES, dtype=torch.float64) - 0.3
    assert bool(path.finite)
    for example in range(EXAMPLES):
        expected = autograd_gradients(path.rules, losses[example])
        assert_same(path.rules, path_gradients(path.rules, terms, example), expected, tolerance)
    reached = [(rule, term) for rule, term in zip(path.rules, terms, strict=True) if term is not None]
    expected = autograd_gradients([rule for rule, _ in reached], weights @ losses)
    assert_same([rule for rule, _ in reached], [term.total(weights) for _, term in reached], expected, tolerance)
    path.close()
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
    with pytest.raises(AssertionError, match=r"layers\.[01]\."):
        compare(tiny_classifier("vit"), cut=False)


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@plain_families
def test_masked_rows(family: str, attention: str) -> None:
    model = tiny_classifier(family, attn_implementation=attention)
    rows = model.base_model.embeddings.position_embeddings.shape[1]
    mask = torch.ones(EXAMPLES, rows, dtype=torch.long)
    mask[1, 2:] = mask[3, -1] = 0
    compare(model, 1e-5 if attention == "eager" else 1e-10, attention_mask=mask)


# -- randomness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit", "beit"])
def test_dropout_of_the_blocks_is_followed(family: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3, hidden_dropout_prob=0.3).train()
    model.base_model.embeddings.dropout.p = 0.0  # on all rows, and not recorded
    compare(model)
    without = model.eval()
    with pytest.raises(AssertionError, match=family):  # it did matter
        terms_differ(without.train(), without)


def terms_differ(model: Any, _: Any) -> None:
    """Compare with autograd under other masks."""
    path, data = path_of(model), batch()
    labels = data.pop("labels")
    path.start(EXAMPLES)
    path.arm(slice(0, EXAMPLES))
    with torch.no_grad():
        model(**data)
    path.disarm()
    with cut_patch_streams(model, path):
        losses, pullbacks = losses_of(model, data, labels)
    terms = path.gradients(pullbacks)
    path.close()
    assert_same(path.rules, path_gradients(path.rules, terms, 0), autograd_gradients(path.rules, losses[0]), 1e-3)
