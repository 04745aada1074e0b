"""Captured coordinates against per-example gradients from ``torch.func``, for every parameter rule."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyImages, tiny_classifier, tiny_vit
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hf_lgp.capture import Capture
from hf_lgp.factors import Factors
from hf_lgp.rules import coverage, trunk_rules
from hf_lgp.subspace import Subspace

EXAMPLES = 5


class Zoo(nn.Module):
    """One layer of every kind that has a rule, and one (the matrix) that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.bare_conv = nn.Conv2d(4, 4, 2, bias=False)
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 8, 4))
        self.norm = nn.LayerNorm(4)
        self.scaled_norm = nn.LayerNorm(4, bias=False)
        self.linear = nn.Linear(4, 6)
        self.bare_linear = nn.Linear(6, 4, bias=False)
        self.twice = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.other_scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        patches = self.bare_conv(self.conv(pixels)).flatten(2).mT
        rows = torch.cat([self.token.expand(len(pixels), -1, -1), patches, self.words(ids)], dim=1) + self.positions
        rows = self.bare_linear(torch.tanh(self.linear(self.norm(rows)))) + rows
        rows = self.twice(torch.tanh(self.twice(self.scaled_norm(rows)))) * self.scale
        return self.head((self.other_scale * rows @ self.matrix).mean(1))


def coordinates_of(
    model: nn.Module, head: nn.Linear, inputs: dict[str, Tensor], rank: int, chosen: Tensor | slice
) -> tuple:
    """Rules, subspace and captured coordinates of one forward and backward of the summed loss."""
    rules = trunk_rules(model, head)
    subspace = Subspace([(rule.rows, rule.cols) for rule in rules], rank, dtype=torch.float64)
    capture = Capture(rules, subspace)
    count = len(torch.arange(EXAMPLES)[chosen])
    buffer = torch.full((count, subspace.size), torch.nan, dtype=torch.float64)
    capture.arm(buffer, EXAMPLES, chosen)
    loss_of(model, model.state_dict(keep_vars=True), inputs).backward()
    capture.disarm()
    return rules, subspace, buffer


def loss_of(model: nn.Module, parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    output = functional_call(model, parameters, kwargs=inputs)
    logits = getattr(output, "logits", output)
    return torch.nn.functional.softplus(logits).square().sum()


def reference_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-example gradients by ``torch.func``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        return loss_of(model, parameters, {name: value[None] for name, value in example.items()})

    return vmap(grad(one), in_dims=(None, 0))(parameters, inputs)


def zoo() -> tuple[nn.Module, nn.Linear, dict[str, Tensor]]:
    model = Zoo().double()
    pixels = torch.randn(EXAMPLES, 2, 5, 5, dtype=torch.float64)
    return model, model.head, {"pixels": pixels, "ids": torch.randint(0, 7, (EXAMPLES, 3))}


def vit() -> tuple[nn.Module, nn.Linear, dict[str, Tensor]]:
    model = tiny_vit()
    return model, model.classifier, {"pixel_values": TinyImages(EXAMPLES).pixels}


def beit() -> tuple[nn.Module, nn.Linear, dict[str, Tensor]]:
    model = tiny_classifier("beit")
    return model, model.classifier, {"pixel_values": TinyImages(EXAMPLES).pixels}


def dinov2() -> tuple[nn.Module, nn.Linear, dict[str, Tensor]]:
    model = tiny_classifier("dinov2")
    return model, model.classifier, {"pixel_values": TinyImages(EXAMPLES).pixels}


@pytest.mark.parametrize("chosen", [slice(None), slice(0, 2), torch.tensor([4, 1, 2])], ids=["all", "first", "some"])
@pytest.mark.parametrize("rank", [2, 100], ids=["low rank", "full rank"])
@pytest.mark.parametrize("make", [zoo, vit, beit, dinov2])
def test_coordinates_are_projected_per_example_gradients(make, rank: int, chosen) -> None:
    model, head, inputs = make()
    rules, subspace, captured = coordinates_of(model, head, inputs, rank, chosen)
    exact = reference_gradients(model, inputs)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for position, rule in enumerate(rules):
        gradients = [exact[names[parameter]][chosen] for parameter in rule.parameters]
        left, right = subspace.bases(position)
        matrices = torch.stack([as_matrix(rule, [g[i] for g in gradients]) for i in range(len(captured))])
        segment = subspace.segments[position]
        actual = captured[:, segment.start : segment.start + segment.size].reshape(-1, left.shape[1], right.shape[1])
        torch.testing.assert_close(actual, left.T @ matrices @ right, rtol=1e-10, atol=1e-12, msg=rule.name)
    if rank == 100:
        lifted = [subspace.lift(row) for row in captured]
        for position, rule in enumerate(rules):
            back = rule.gradients(lifted[0][position])
            for gradient, parameter in zip(back, rule.parameters, strict=True):
                torch.testing.assert_close(gradient, exact[names[parameter]][chosen][0], rtol=1e-10, atol=1e-12)


def as_matrix(rule, gradients: list[Tensor]) -> Tensor:
    """The gradient matrix whose :meth:`Rule.gradients` are ``gradients``, written out kind by kind."""
    if type(rule).__name__ == "LayerNormRule":
        return torch.stack(gradients)
    if type(rule).__name__ == "BroadcastRule":
        return gradients[0].reshape(rule.rows, rule.cols)
    weight = gradients[0].reshape(rule.rows, -1)
    return torch.cat([weight, gradients[1][:, None]], 1) if len(gradients) == 2 else weight


def test_every_kind_of_layer_in_the_zoo_has_a_rule_except_the_matrix() -> None:
    model, head, _ = zoo()
    covered = {p for rule in trunk_rules(model, head) for p in rule.parameters}
    missing = {name for name, p in model.named_parameters() if p not in covered}
    assert missing == {"matrix", "head.weight", "head.bias"}


def test_all_of_a_vits_trunk_is_covered_and_frozen_parameters_do_not_count() -> None:
    model = tiny_vit()
    assert coverage(trunk_rules(model, model.classifier), model, model.classifier) == 1.0
    model.vit.embeddings.requires_grad_(False)
    rules = trunk_rules(model, model.classifier)
    assert coverage(rules, model, model.classifier) == 1.0
    assert not any("embeddings" in rule.name for rule in rules)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_bias_whose_weight_is_frozen_is_not_covered(kind: type[nn.Module]) -> None:
    model = tiny_vit()
    modules = [module for module in model.vit.modules() if isinstance(module, kind)]
    for module in modules:
        module.weight.requires_grad_(False)
    biases = {module.bias for module in modules}
    rules = trunk_rules(model, model.classifier)
    covered = {parameter for rule in rules for parameter in rule.parameters}
    assert biases and not covered & biases
    assert coverage(rules, model, model.classifier) < 1.0


def test_parameters_shared_between_modules_get_no_rule() -> None:
    model, head, _ = zoo()
    model.other = nn.Linear(4, 6)
    model.other.weight = model.linear.weight
    assert not any(rule.name in ("linear", "other") for rule in trunk_rules(model, head))


def test_capture_changes_no_gradient_and_leaves_no_hook() -> None:
    model, head, inputs = vit()
    loss_of(model, model.state_dict(keep_vars=True), inputs).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    coordinates_of(model, head, inputs, 2, slice(None))
    for before, after in zip(plain, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_are_not_batch_major_are_left_out() -> None:
    rule = next(r for r in trunk_rules(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), nn.Linear(1, 1)))
    assert rule.factors(torch.randn(7, 3), torch.randn(7, 3), EXAMPLES, slice(None)) is None
    windows = rule.factors(torch.randn(10, 4, 3), torch.randn(10, 4, 3), EXAMPLES, slice(None))
    assert isinstance(windows, Factors) and windows.right.shape == (EXAMPLES, 8, 3)
