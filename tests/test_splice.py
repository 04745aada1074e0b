"""The two streams' backward, by itself: weights, order, and predictions that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lgp.splice import Apart, Combine, Enter, Predicted

M, CONTROLS = 5, 2


def spliced(predict: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``H`` of five examples, its input, a parameter, and the order of the examples."""
    h0 = torch.randn(M, 3, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 0, 4, 1, 2])
    inverse = order.argsort()
    control, stand_in = Enter.apply(h0, order, inverse, CONTROLS)
    others = (h0[order[CONTROLS:]] * parameter).detach()
    out = Combine.apply(control * parameter, Predicted.apply(stand_in, predict, parameter), others, order)
    return out, h0, parameter, order


def test_every_example_has_its_own_value() -> None:
    out, h0, parameter, _ = spliced(lambda delta: (None, [None]))
    torch.testing.assert_close(out, h0 * parameter)


def test_a_perfect_prediction_gives_the_exact_gradient() -> None:
    delta = torch.randn(M, 3, dtype=torch.float64)
    known: dict[str, Tensor] = {}

    def predict(weighted: Tensor) -> Any:
        return weighted * known["parameter"], [(weighted * known["h0"]).sum(0)]

    out, h0, parameter, order = spliced(predict)
    known.update(parameter=parameter.detach(), h0=h0.detach()[order])
    of_h0, of_parameter = torch.autograd.grad(out, [h0, parameter], delta)
    torch.testing.assert_close(of_h0, delta * parameter)
    torch.testing.assert_close(of_parameter, (delta * h0).sum(0))


def test_without_a_prediction_control_examples_count_for_all() -> None:
    delta = torch.randn(M, 3, dtype=torch.float64)
    out, h0, parameter, order = spliced(lambda weighted: (torch.zeros_like(weighted), [None]))
    (of_parameter,) = torch.autograd.grad(out, [parameter], delta)
    chosen = order[:CONTROLS]
    torch.testing.assert_close(of_parameter, M / CONTROLS * (delta * h0)[chosen].sum(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_left_out_whole(bad: float) -> None:
    delta = torch.randn(M, 3, dtype=torch.float64)
    gradients = []
    for of_parameter in (torch.zeros(3), torch.tensor([1.0, bad, 2.0])):
        torch.manual_seed(0)
        out, h0, parameter, _ = spliced(lambda weighted, p=of_parameter: (torch.zeros_like(weighted), [p.double()]))
        gradients.append(torch.autograd.grad(out, [h0, parameter], delta))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_examples_apart_are_pulled_by_their_own_function() -> None:
    control = torch.randn(2, 3, requires_grad=True)
    value, seen = torch.randn(2, 3), []
    out = Apart.apply(control, value, lambda delta: (seen.append(delta) or 2 * delta, []))
    assert torch.equal(out, value)
    (gradient,) = torch.autograd.grad(out, [control], torch.ones(2, 3))
    assert torch.equal(gradient, 2 * torch.ones(2, 3)) and len(seen) == 1
