"""The residual's share of a gradient's variance, from measurements that fade with time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY = 512.0
"""Micro-batches after which a measurement counts 1/e: sixteen measurements, while gradients are predicted."""


@dataclass(frozen=True)
class Residual:
    """Sums over measurements: numerators and denominators are added up before they are divided."""

    residual: tuple[float, ...] = ()  # of ``sigma_e^2``, by tensor
    total: tuple[float, ...] = ()  # of ``sigma^2``
    count: int = 0  # measurements
    at: int = 0  # micro-batch of the last one

    @property
    def share(self) -> float:
        """``sigma_e^2 / sigma^2``: half over all tensors together, half the mean over tensors; 1 before any measurement.

        The first is the extra variance of the gradient as a vector. The second is what an optimizer sees that scales every tensor by itself.
        """
        whole = sum(self.total)
        if not whole > 0.0:
            return 1.0
        each = [min(1.0, r / t) for r, t in zip(self.residual, self.total, strict=True) if t > 1e-9 * whole]
        return 0.5 * (min(1.0, sum(self.residual) / whole) + sum(each) / len(each))

    def measured(self, residual: Sequence[float], total: Sequence[float], at: int) -> Residual:
        """With one more measurement, made at micro-batch ``at``."""
        fade = math.exp((self.at - at) / _MEMORY) if len(self.total) == len(total) else 0.0
        before = list(zip(self.residual, self.total, strict=True)) if fade else [(0.0, 0.0)] * len(total)
        sums = [(fade * r0 + r, fade * t0 + t) for (r0, t0), r, t in zip(before, residual, total, strict=True)]
        return Residual(tuple(r for r, _ in sums), tuple(t for _, t in sums), self.count + 1 if fade else 1, at)
