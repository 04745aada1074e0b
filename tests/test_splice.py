"""Formula (1) on a stack of one product: weights, order, leaves in half precision, and predictions that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lgp.splice import Gradients, Spliced


def totals(
    exact: list[Tensor | None], predicted: list[Tensor | None], of_rows: Tensor | None = None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Sums for as many parameters, in float32, as there are gradients."""
    parameters = {k: nn.Parameter(torch.zeros(3)) for k in range(len(exact))}
    gradients = Gradients(parameters)
    gradients.add(dict(enumerate(exact)), dict(enumerate(predicted)))
    return gradients.totals(of_rows)


def test_the_backward_is_the_function_that_was_given() -> None:
    h0, parameter = torch.randn(2, 3, requires_grad=True), nn.Parameter(torch.randn(3))
    value, seen = torch.randn(2, 3), list[Tensor]()

    def pull(delta: Tensor) -> Any:
        seen.append(delta)
        return 2 * delta, [delta.sum(0)]

    out = Spliced.apply(h0, lambda: value, pull, parameter)
    assert torch.equal(out, value)
    of_h0, of_parameter = torch.autograd.grad(out, [h0, parameter], torch.ones(2, 3))
    assert torch.equal(of_h0, torch.full((2, 3), 2.0)) and torch.equal(of_parameter, torch.full((3,), 2.0))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_and_predicted_gradients_are_added_and_given_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([0.5, 0.0, -3.0], dtype=dtype)
    _, (total,) = totals([one], [other], torch.ones(2))
    assert total is not None and total.dtype == torch.float32 and total.tolist() == [1.5, 2.0, 0.0]


def test_what_is_missing_counts_as_zero() -> None:
    g = torch.ones(3)
    _, found = totals([g, None, None], [None, g, None])
    assert found[2] is None and all(torch.equal(t, g) for t in found[:2] if t is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["parameter", "rows"])
def test_predictions_that_are_not_finite_are_left_out_whole(bad: float, where: str) -> None:
    exact: list[Tensor | None] = [torch.ones(3), torch.ones(3)]
    predicted: list[Tensor | None] = [torch.ones(3), torch.ones(3)]
    of_rows = torch.ones(2, 3)
    (of_rows if where == "rows" else predicted[1])[..., 1] = bad  # type: ignore[index]
    of_rows, found = totals(exact, predicted, of_rows)
    assert of_rows is not None and torch.equal(of_rows, torch.zeros(2, 3))
    assert all(torch.equal(t, torch.ones(3)) for t in found if t is not None)


def test_with_loss_scaling_an_overflow_reaches_the_scaler() -> None:
    gradients = Gradients({0: torch.zeros(3)}, loud=True)
    gradients.add({0: torch.ones(3)}, {0: torch.tensor([1.0, float("nan"), 1.0])})
    of_rows, (total,) = gradients.totals(torch.ones(2))
    assert of_rows is not None and total is not None
    assert of_rows.isinf().all() and total.isinf().all()


def test_parameters_may_be_given_the_same_gradient() -> None:
    gradients, given = Gradients({0: torch.zeros(3), 1: torch.zeros(3)}), torch.ones(3)
    gradients.add({0: torch.ones(3), 1: torch.zeros(3)}, {0: given, 1: given})
    first, second = gradients.totals(None)[1]
    assert torch.equal(first, torch.full((3,), 2.0)) and torch.equal(second, torch.ones(3))


def test_blocks_may_share_a_parameter() -> None:
    gradients = Gradients({7: nn.Parameter(torch.zeros(3))})
    gradients.add({7: torch.ones(3)}, {7: torch.ones(3)})
    gradients.add({7: torch.ones(3)}, {7: None})
    assert torch.equal(gradients.totals(None)[1][0], torch.full((3,), 3.0))
