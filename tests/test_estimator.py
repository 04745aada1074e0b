"""Weights, variance and price: the algebra, by hypothesis."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lgp.estimator import control_size, control_weights, price, relative_variance, spread


@given(examples=st.integers(1, 50), fraction=st.floats(0.01, 1.0))
def test_there_is_always_a_control_example_and_never_too_many(examples: int, fraction: float) -> None:
    assert 1 <= control_size(examples, fraction) <= examples


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="control fraction"):
        control_size(4, fraction)


@given(examples=st.integers(2, 6), data=st.data())
def test_over_all_draws_predictions_cancel_and_exact_gradients_count_once(examples: int, data: st.DataObject) -> None:
    controls = data.draw(st.integers(1, examples))
    weights = control_weights(examples, controls, torch.float64, torch.device("cpu"))
    of_predictions, of_exact = torch.zeros(examples, dtype=torch.float64), torch.zeros(examples, dtype=torch.float64)
    draws = list(itertools.combinations(range(examples), controls))
    for draw in draws:
        order = [*draw, *(i for i in range(examples) if i not in draw)]
        of_predictions[order] += weights / len(draws)
        of_exact[list(draw)] += examples / controls / len(draws)
    torch.testing.assert_close(of_predictions, torch.zeros_like(of_predictions), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(of_exact, torch.ones_like(of_exact))


def test_variance_is_what_a_simulation_has() -> None:
    """Gradients with a known residual, drawn anew for every batch."""
    draw, fraction, share, m = torch.Generator().manual_seed(0), 0.25, 0.3, 8
    controls, count = control_size(m, fraction), 40_000
    predicted = torch.randn(count, m, generator=draw) * (1 - share) ** 0.5
    residual = torch.randn(count, m, generator=draw) * share**0.5
    gradient = predicted + residual
    estimate = m / controls * gradient[:, :controls].sum(1) + predicted @ control_weights(
        m, controls, torch.float32, torch.device("cpu")
    )
    found = float(estimate.var() / gradient.sum(1).var())
    assert found == pytest.approx(relative_variance(fraction, share), rel=0.03)


def test_the_price_is_variance_times_cost() -> None:
    assert price(0.25, 0.02, 0.55) == pytest.approx(1.06 * 0.55)


@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=2, max_size=6))
def test_spread_is_that_around_the_mean(vectors: list[list[float]]) -> None:
    v = torch.tensor(vectors, dtype=torch.float64)
    found = spread(v.sum(0).square().sum(), v.square().sum(), len(v))
    torch.testing.assert_close(found, (v - v.mean(0)).square().sum(), atol=1e-9, rtol=1e-9)
