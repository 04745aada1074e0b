"""The estimator's formulas, by enumeration of every draw and of every sample."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp import estimator

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def correlated_pair(examples: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients and predictions that correlate, shape ``(examples, size)``."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(examples, size, generator=generator, dtype=torch.float64) + 1.0
    noise = torch.randn(examples, size, generator=generator, dtype=torch.float64)
    return exact, 0.8 * exact + 0.3 * noise - 2.0


def all_estimates(exact: Tensor, guess: Tensor, controls: int, alpha: Tensor | float) -> Tensor:
    """Formula (1) for every possible draw of the control subset."""
    draws = itertools.combinations(range(len(exact)), controls)
    return torch.stack(
        [estimator.combine(exact[list(s)].mean(0), guess.mean(0), guess[list(s)].mean(0), alpha) for s in draws]
    )


@quick
@given(seed=seeds, examples=st.integers(2, 7), controls=st.integers(1, 6))
def test_combine_is_unbiased_over_all_draws(seed: int, examples: int, controls: int) -> None:
    exact, guess = correlated_pair(examples, 3, seed)
    alpha = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    estimates = all_estimates(exact, guess, min(controls, examples), alpha)
    torch.testing.assert_close(estimates.mean(0), exact.mean(0), rtol=0, atol=1e-12)


def test_combine_with_a_perfect_prediction_has_no_variance() -> None:
    exact, _ = correlated_pair(6, 3, seed=0)
    estimates = all_estimates(exact, exact + 5.0, 2, 1.0)
    torch.testing.assert_close(estimates, exact.mean(0).expand_as(estimates), rtol=0, atol=1e-12)


def test_combine_without_weight_is_the_control_mean() -> None:
    exact, guess = correlated_pair(5, 3, seed=1)
    assert torch.equal(estimator.combine(exact[:2].mean(0), guess.mean(0), guess[:2].mean(0), 0.0), exact[:2].mean(0))


@quick
@given(seed=seeds, controls=st.integers(1, 5))
def test_optimal_alpha_minimises_the_variance_over_draws(seed: int, controls: int) -> None:
    exact, guess = correlated_pair(6, 4, seed)
    centred, centred_guess = exact - exact.mean(0), guess - guess.mean(0)
    alpha = estimator.optimal_alpha((centred * centred_guess).sum(), centred_guess.square().sum(), limit=100.0)

    def variance(coefficient: Tensor) -> float:
        estimates = all_estimates(exact, guess, controls, coefficient)
        return float((estimates - exact.mean(0)).square().sum(1).mean())

    assert 0 < alpha < 100
    assert variance(alpha) < min(variance(alpha - 0.05), variance(alpha + 0.05))


@pytest.mark.parametrize(
    ("covariance", "variance", "alpha"),
    [(3.0, 4.0, 0.75), (-1.0, 4.0, 0.0), (9.0, 3.0, 2.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_optimal_alpha_is_clipped(covariance: float, variance: float, alpha: float) -> None:
    assert estimator.optimal_alpha(torch.tensor([covariance]), torch.tensor([variance])).tolist() == [alpha]


@quick
@given(seed=seeds)
def test_squared_correlation_of_scalars_is_pearsons(seed: int) -> None:
    exact, guess = correlated_pair(20, 1, seed)
    pearson = torch.corrcoef(torch.cat([exact, guess], dim=1).T)[0, 1]
    centred, centred_guess = exact - exact.mean(0), guess - guess.mean(0)
    rho2 = estimator.squared_correlation(
        (centred * centred_guess).sum(), centred.square().sum(), centred_guess.square().sum()
    )
    assert pearson > 0
    torch.testing.assert_close(rho2, pearson.square())


@pytest.mark.parametrize(
    ("covariance", "variance", "predicted", "rho2"),
    [(1.0, 2.0, 2.0, 0.25), (-1.0, 2.0, 2.0, 0.0), (3.0, 2.0, 2.0, 1.0), (1.0, 0.0, 2.0, 0.0), (1.0, 2.0, 0.0, 0.0)],
)
def test_squared_correlation_is_clipped(covariance: float, variance: float, predicted: float, rho2: float) -> None:
    values = (torch.tensor([value]) for value in (covariance, variance, predicted))
    assert estimator.squared_correlation(*values).tolist() == [rho2]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squared_correlation_of_extreme_gradients(scale: float) -> None:
    covariance, variance, predicted = torch.tensor([1.0, 2.0, 2.0]) * scale
    torch.testing.assert_close(estimator.squared_correlation(covariance, variance, predicted), torch.tensor(0.25))


@pytest.mark.parametrize("controls", [1, 2, 3, 4])
def test_relative_variance_by_enumerating_every_sample(controls: int) -> None:
    # A population of three equally likely examples, of which every micro-batch of four is listed. Draws from it are
    # exchangeable, so the control subset may be the first ones.
    exact, guess = correlated_pair(3, 2, seed=3)
    centred, centred_guess = exact - exact.mean(0), guess - guess.mean(0)
    covariance, variance, predicted = (
        (centred * centred_guess).sum(),
        centred.square().sum(),
        centred_guess.square().sum(),
    )
    alpha = estimator.optimal_alpha(covariance, predicted, limit=100.0)
    rho2 = float(estimator.squared_correlation(covariance, variance, predicted))
    squares = []
    for sample in itertools.product(range(3), repeat=4):
        g, p = exact[list(sample)], guess[list(sample)]
        estimate = estimator.combine(g[:controls].mean(0), p.mean(0), p[:controls].mean(0), alpha)
        squares.append((estimate - exact.mean(0)).square().sum())
    plain = float(variance) / 3 / 4
    assert 0.1 < rho2 < 0.99
    assert float(torch.stack(squares).mean()) / plain == pytest.approx(estimator.relative_variance(controls / 4, rho2))


def test_price_is_variance_times_cost() -> None:
    assert estimator.relative_variance(0.25, 0.5) == pytest.approx((1 - 0.75 * 0.5) / 0.25)
    assert estimator.relative_cost(0.25, 0.2) == pytest.approx(0.25 + 0.75 * 0.2)
    assert estimator.price(0.25, 0.5, 0.2) == pytest.approx(2.5 * 0.4)
    assert estimator.price(1.0, 0.5, 0.2) == 1.0


@quick
@given(rho2=st.floats(0.02, 0.98), kappa=st.floats(0.02, 0.98))
@example(rho2=0.020000000000000004, kappa=0.02)
def test_best_fraction_beats_a_grid(rho2: float, kappa: float) -> None:
    fraction, best = estimator.best_fraction(rho2, kappa), estimator.best_price(rho2, kappa)
    grid = min(estimator.price(step / 2000, rho2, kappa) for step in range(1, 2001))
    assert 0 < fraction <= 1
    assert best == pytest.approx(estimator.price(fraction, rho2, kappa), rel=1e-9)
    assert best <= grid + 1e-9
    assert grid == pytest.approx(best, rel=2e-3)
    if abs(rho2 - kappa) > 1e-6:  # at the break-even the price is 1 but for rounding
        assert (best < 1) == estimator.pays(rho2, kappa)


def test_nothing_pays_at_the_break_even() -> None:
    assert not estimator.pays(0.3, 0.3)
    assert estimator.best_fraction(0.3, 0.3) == estimator.best_price(0.3, 0.3) == 1.0
    assert estimator.best_fraction(0.2, 0.3) == estimator.best_price(0.2, 0.3) == 1.0
    above = math.nextafter(0.3, 1.0) + 1e-6
    assert 0.99 < estimator.best_fraction(above, 0.3) < 1.0
    assert 1 - 1e-9 < estimator.best_price(above, 0.3) < 1.0


def test_best_fraction_in_the_limits() -> None:
    assert estimator.best_fraction(1.0, 0.3) == 0.0
    assert estimator.best_price(1.0, 0.3) == pytest.approx(0.3)
    assert estimator.best_fraction(0.5, 0.0) == 0.0
    assert estimator.best_price(0.5, 0.0) == pytest.approx(0.5)
    assert estimator.best_fraction(1.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("examples", "fraction", "size"),
    [(128, 0.25, 32), (10, 0.26, 3), (10, 0.01, 1), (1, 0.25, 1), (7, 1.0, 7), (3, 0.99, 3)],
)
def test_control_size(examples: int, fraction: float, size: int) -> None:
    assert estimator.control_size(examples, fraction) == size


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_control_size_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        estimator.control_size(8, fraction)
