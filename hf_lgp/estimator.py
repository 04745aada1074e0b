"""The control-variate estimator: weights, variance, cost and price. Pure functions of numbers and tensors.

Notation: a micro-batch has ``m`` examples, of which ``m_c = f m`` *control* examples, drawn uniformly, get exact gradients. ``sigma^2 = tr Var(g)``
is the variance of one example's gradient ``g`` and ``sigma_e^2 = tr Var(g - g~)`` that of the residual against its prediction ``g~``.

The idea is that of *Linear Gradient Prediction with Control Variates*, arXiv 2511.05187; the formulas are derived in ``docs/mathematics.md``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FRACTIONS = (0.5, 0.25, 0.125, 0.0625)
"""Control fractions to choose from besides 1."""


def control_size(examples: int, fraction: float) -> int:
    """Number of control examples ``m_c = round(f m)``, at least 1 and at most ``m``.

    Raises:
        ValueError: If the fraction is outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"The control fraction must lie in (0, 1], got {fraction}.")
    return min(examples, max(1, round(fraction * examples)))


@lru_cache(maxsize=32)
def control_weights(examples: int, controls: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights ``w_i = 1 - (m / m_c) [i in S]`` of the predictions, control examples first; shape ``(m,)``."""
    weights = torch.ones(examples, dtype=dtype, device=device)
    weights[:controls] -= examples / controls
    return weights


def relative_variance(fraction: float, residual_share: float) -> float:
    """Variance of the estimate over that of the exact batch gradient, with coefficient 1 and a batch from a large population.

    ``V(f) = 1 + (1 / f - 1) sigma_e^2 / sigma^2``                                                        (2)
    """
    return 1.0 + (1.0 / fraction - 1.0) * residual_share


def price(fraction: float, residual_share: float, cost: float) -> float:
    """Statistical price: relative variance times relative cost, formula (3). Plain training has price 1."""
    return relative_variance(fraction, residual_share) * cost


def spread(sums: Tensor, squares: Tensor, groups: int) -> Tensor:
    """Spread of ``G`` vectors around their mean, ``sum_g |v_g|^2 - |sum_g v_g|^2 / G``: ``G - 1`` times their variance.

    ``sums`` is ``|sum_g v_g|^2`` and ``squares`` is ``sum_g |v_g|^2``, of the same shape.
    """
    return (squares - sums / groups).clamp(min=0.0)
