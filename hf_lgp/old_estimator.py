"""The control-variate estimator: how predicted and exact gradients combine, and when that pays.

Notation. A micro-batch has ``m`` examples with gradients ``g_i``. A random *control* subset ``S`` of
``m_c = f * m`` examples gets exact gradients; every example gets a prediction ``g_hat_i`` that was fitted on
earlier steps only. With any coefficient ``alpha`` fixed before the draw::

    G_hat = mean_S(g) + alpha * (mean_all(g_hat) - mean_S(g_hat))                                     (1)

``E_S[mean_S(x)] = mean_all(x)`` for every ``x`` when ``S`` is uniform without replacement, hence
``E_S[G_hat] = mean_all(g)``: unbiased for every predictor and every ``alpha``.

The idea (predicted gradients with a control variate, the break-even between their cost and their accuracy) is
that of *Linear Gradient Prediction with Control Variates*, arXiv 2511.05187; the formulas (2) to (4) are derived
in ``docs/mathematics.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def combine(
    control_mean: Tensor, predicted_mean: Tensor, predicted_control_mean: Tensor, alpha: Tensor | float
) -> Tensor:
    """Combine exact and predicted gradients without bias, formula (1).

    Args:
        control_mean: ``mean_S(g)``, exact mean gradient over the control subset, any shape.
        predicted_mean: ``mean_all(g_hat)``, mean prediction over the whole micro-batch, same shape.
        predicted_control_mean: ``mean_S(g_hat)``, mean prediction over the control subset, same shape.
        alpha: Control-variate coefficient, broadcastable; must not depend on the draw of ``S``.

    Returns:
        The unbiased estimate of ``mean_all(g)``, same shape as ``control_mean``.
    """
    return control_mean + alpha * (predicted_mean - predicted_control_mean)


def control_size(examples: int, fraction: float) -> int:
    """Number of control examples ``m_c = round(f * m)``, at least 1 and at most ``examples``.

    Args:
        examples: Size ``m`` of the micro-batch, at least 1.
        fraction: Control fraction ``f`` in (0, 1].

    Raises:
        ValueError: If ``fraction`` is outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"The control fraction must lie in (0, 1], got {fraction}.")
    return min(examples, max(1, round(fraction * examples)))


def optimal_alpha(covariance: Tensor, predicted_variance: Tensor, limit: float = 2.0) -> Tensor:
    """Coefficient that minimises the variance of (1): ``Cov(g, g_hat) / Var(g_hat)``, clipped to ``[0, limit]``.

    The clip keeps one bad estimate from *adding* variance: a prediction that is anti-correlated with the gradient is
    switched off rather than used with its sign flipped.

    Args:
        covariance: Estimates of ``tr Cov(g, g_hat)``, one per tensor, any shape.
        predicted_variance: Estimates of ``tr Var(g_hat)``, same shape.
        limit: Upper bound of the coefficient.

    Returns:
        ``alpha``, same shape; 0 where ``g_hat`` does not vary.
    """
    safe = torch.where(predicted_variance > 0, predicted_variance, torch.ones_like(predicted_variance))
    alpha = torch.where(predicted_variance > 0, covariance / safe, torch.zeros_like(covariance))
    return alpha.clamp(0.0, limit)


def squared_correlation(covariance: Tensor, variance: Tensor, predicted_variance: Tensor) -> Tensor:
    """Squared correlation ``rho^2 = Cov^2 / (Var(g) Var(g_hat))`` of per-example gradients, clipped to [0, 1].

    Args:
        covariance: ``tr Cov(g, g_hat)``, any shape.
        variance: ``tr Var(g)``, same shape.
        predicted_variance: ``tr Var(g_hat)``, same shape.

    Returns:
        ``rho^2``, same shape; 0 where either variance vanishes or the correlation is negative.
    """
    varies = (variance > 0) & (predicted_variance > 0)
    positive, one = covariance.clamp(min=0), torch.ones_like(covariance)
    # Two quotients, since the products of tiny variances underflow in float32.
    rho2 = (positive / torch.where(varies, variance, one)) * (positive / torch.where(varies, predicted_variance, one))
    return torch.where(varies, rho2, torch.zeros_like(rho2)).clamp(0.0, 1.0)


def relative_variance(fraction: float, rho2: float) -> float:
    """Variance of ``G_hat`` over that of the exact mean of all ``m`` examples, with optimal ``alpha``.

    For a micro-batch drawn from an infinite population, ``Var(G_hat) = (sigma^2 / m) * (1 - (1 - f) rho^2) / f``,   (2)
    where ``sigma^2`` is the trace of the variance of one example's gradient.

    Args:
        fraction: Control fraction ``f`` in (0, 1].
        rho2: Squared correlation of ``g`` and ``g_hat`` in [0, 1].
    """
    return (1.0 - (1.0 - fraction) * rho2) / fraction


def relative_cost(fraction: float, kappa: float) -> float:
    """Cost of ``G_hat`` in units of one exact forward and backward of all ``m`` examples: ``f + (1 - f) kappa``, formula (3).

    Args:
        fraction: Control fraction ``f`` in (0, 1].
        kappa: Time of a prediction over the time of an exact forward and backward, per example.
    """
    return fraction + (1.0 - fraction) * kappa


def price(fraction: float, rho2: float, kappa: float) -> float:
    """Statistical price ``E(f)``: relative variance times relative cost. Plain training has price 1."""
    return relative_variance(fraction, rho2) * relative_cost(fraction, kappa)


def pays(rho2: float, kappa: float) -> bool:
    """Whether any control fraction below 1 has a price below 1: exactly when ``rho^2 > kappa``."""
    return rho2 > kappa


def best_fraction(rho2: float, kappa: float) -> float:
    """Control fraction of least price: ``f* = sqrt(kappa (1 - rho^2) / ((1 - kappa) rho^2))``, formula (4).

    Args:
        rho2: Squared correlation in [0, 1].
        kappa: Cost of a prediction in (0, 1).

    Returns:
        ``f*`` in (0, 1); 1 when no fraction pays; 0 in the limit of perfect or free predictions.
    """
    if not pays(rho2, kappa):
        return 1.0
    return min(1.0, math.sqrt(kappa * (1.0 - rho2) / ((1.0 - kappa) * rho2)))


def best_price(rho2: float, kappa: float) -> float:
    """Price at the best fraction, formula (4): ``(sqrt((1 - kappa)(1 - rho^2)) + sqrt(kappa rho^2))^2``, 1 if none pays."""
    if not pays(rho2, kappa):
        return 1.0
    return (math.sqrt((1.0 - kappa) * (1.0 - rho2)) + math.sqrt(kappa * rho2)) ** 2
