"""Tracked bases: a small space of gradients for every tensor, which follows training.

A gradient matrix ``G`` (rows x cols) is kept as ``C = A^T G B`` with orthonormal ``A`` and ``B``, the leading singular spaces of recent centred per-example
gradients, by warm-started orthogonal iteration on averaged second moments. Stored coordinates follow: ``C <- (A_new^T A_old) C (B_old^T B_new)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .factored import Factors

_DECAY = 0.7


class Basis(NamedTuple):
    """The bases ``A (rows, k_a)`` and ``B (cols, k_b)`` of one gradient matrix, and gradients' averaged second moments in them, ``(k_a, k_a)`` and ``(k_b, k_b)``."""

    left: Tensor
    right: Tensor
    left_moment: Tensor
    right_moment: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(k_a, k_b)`` of the coordinates of one gradient."""
        return self.left.shape[1], self.right.shape[1]

    def project(self, gradients: Factors) -> Tensor:
        """Coordinates ``C_i`` of ``b`` gradients, shape ``(b, k_a k_b)``."""
        return ((gradients[0] @ self.left).mT @ (gradients[1] @ self.right)).flatten(1)

    def lift(self, coordinates: Tensor) -> Tensor:
        """The gradient matrix ``A C B^T`` of coordinates of shape ``(k_a k_b,)``."""
        return self.left @ coordinates.view(self.shape) @ self.right.T

    def products(self, gradients: Factors) -> tuple[Tensor, Tensor]:
        """One power step on either side: ``(1/b) sum_i G~_i G~_i^T A`` and ``(1/b) sum_i G~_i^T G~_i B`` for ``G~_i = G_i - mean G``."""
        # sum_i (G_i - G)(G_i - G)^T A = sum_i G_i (Z_i - Z) with Z_i = G_i^T A and Z its mean.
        left, right = gradients
        back, forth = right.mT @ (left @ self.left), left.mT @ (right @ self.right)
        back, forth = back - back.mean(0), forth - forth.mean(0)
        return (left.mT @ (right @ back)).mean(0), (right.mT @ (left @ forth)).mean(0)


def sizes(rows: int, cols: int, rank: int) -> tuple[int, int]:
    """Numbers of basis vectors ``(k_a, k_b)``: about ``rank^2`` coordinates. A side shorter than ``rank`` is kept whole, and the other gets more."""
    short_rows, short_cols = min(rows, rank), min(cols, rank)
    return min(rows, max(rank, rank * rank // short_cols)), min(cols, max(rank, rank * rank // short_rows))


def initial(rows: int, cols: int, rank: int, generator: torch.Generator, like: Tensor) -> Basis:
    """Random bases of a matrix, on the device and in the dtype of ``like``."""

    def basis(d: int, k: int) -> Tensor:
        if k == d:
            return torch.eye(d).to(like)
        return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.to(like).contiguous()

    left, right = sizes(rows, cols, rank)
    return Basis(basis(rows, left), basis(cols, right), like.new_zeros(left, left), like.new_zeros(right, right))


def moved(old: Basis, products: tuple[Tensor, Tensor]) -> tuple[Basis, Tensor, Tensor]:
    """The bases after one step of orthogonal iteration on :meth:`Basis.products`, ``A_new^T A_old`` and ``B_new^T B_old``."""
    left, left_moment, left_turn = _moved_side(old.left, old.left_moment, products[0])
    right, right_moment, right_turn = _moved_side(old.right, old.right_moment, products[1])
    return Basis(left, right, left_moment, right_moment), left_turn, right_turn


def turned(coordinates: Tensor, shape: tuple[int, int], left: Tensor, right: Tensor) -> Tensor:
    """Coordinates ``(n, k_a k_b)`` in moved bases."""
    return (left @ coordinates.unflatten(1, shape) @ right.T).flatten(1)


def _moved_side(old: Tensor, old_moment: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    identity = torch.eye(old.shape[1], dtype=torch.float64, device=old.device)
    if old.shape[0] == old.shape[1]:  # spans everything: it never moves
        return old, old_moment, identity.to(old)
    basis, moment, wide = old.double(), old_moment.double(), product.double()
    # Scaled to unit size: gradients shrink by orders of magnitude in early training, and large old ones would hold the bases.
    tiny = torch.finfo(torch.float64).tiny
    mixed = _DECAY * (basis @ moment) + (1.0 - _DECAY) * wide / wide.norm().clamp(min=tiny)
    # A little of the previous basis stands in for directions that the products do not have.
    fresh = torch.linalg.qr(mixed / mixed.norm().clamp(min=tiny) + 1e-6 * basis).Q
    turn = fresh.T @ basis
    rotated = fresh.T @ mixed @ turn.T
    # Non-finite gradients must not replace good bases.
    healthy = fresh.isfinite().all() & rotated.isfinite().all()
    pairs = (fresh, basis), (0.5 * (rotated + rotated.T), moment), (turn, identity)
    fresh, rotated, turn = (torch.where(healthy, new, kept).to(old).contiguous() for new, kept in pairs)
    return fresh, rotated, turn
