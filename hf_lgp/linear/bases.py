"""Tracked bases: a small space of gradients for every tensor, which follows training.

A gradient matrix ``G`` (rows x cols) is kept as ``C = A^T G B`` with orthonormal ``A`` and ``B``, the leading singular spaces of recent centred per-example gradients. They follow
training by warm-started orthogonal iteration on averaged second moments. Stored coordinates are
re-expressed when the bases move: ``C <- (A_new^T A_old) C (B_old^T B_new)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factored import Factors

_DECAY = 0.7


@dataclass(frozen=True)
class Side:
    """One side's basis and what is known of the moments in it.

    Attributes:
        basis: Orthonormal columns, shape ``(d, k)``.
        moment: Averaged second moment of gradients in this basis, shape ``(k, k)``.
    """

    basis: Tensor
    moment: Tensor

    @property
    def complete(self) -> bool:
        """Whether it spans everything, so that it never moves."""
        return self.basis.shape[0] == self.basis.shape[1]


@dataclass(frozen=True)
class Basis:
    """The two bases of one gradient matrix.

    Attributes:
        left: ``A``, of the rows.
        right: ``B``, of the columns.
    """

    left: Side
    right: Side

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(k_a, k_b)`` of the coordinates of one gradient."""
        return self.left.basis.shape[1], self.right.basis.shape[1]

    @property
    def size(self) -> int:
        """Coordinates of one gradient."""
        return self.shape[0] * self.shape[1]

    def project(self, gradients: Factors) -> Tensor:
        """Coordinates ``C_i`` of ``b`` gradients, shape ``(b, k_a k_b)``."""
        return gradients.project(self.left.basis, self.right.basis).flatten(1)

    def lift(self, coordinates: Tensor) -> Tensor:
        """The gradient matrix ``A C B^T`` of coordinates of shape ``(k_a k_b,)``."""
        return self.left.basis @ coordinates.view(self.shape) @ self.right.basis.T


def sizes(rows: int, cols: int, rank: int) -> tuple[int, int]:
    """Numbers of basis vectors ``(k_a, k_b)``: about ``rank^2`` coordinates whatever the shape.

    Where one side is shorter than ``rank`` (a norm's weight and bias are two rows) it is kept whole, and the other side gets more.
    """
    short_rows, short_cols = min(rows, rank), min(cols, rank)
    return min(rows, max(rank, rank * rank // short_cols)), min(cols, max(rank, rank * rank // short_rows))


def initial(rows: int, cols: int, rank: int, generator: torch.Generator, like: Tensor) -> Basis:
    """Random bases of a matrix, on the device and in the dtype of ``like``.

    Raises:
        ValueError: If the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"The rank must be at least 1, got {rank}.")

    def side(dimension: int, size: int) -> Side:
        if size == dimension:
            basis = torch.eye(dimension, dtype=torch.float64)
        else:
            basis = torch.linalg.qr(torch.randn(dimension, size, generator=generator, dtype=torch.float64)).Q
        return Side(basis.to(like).contiguous(), like.new_zeros(size, size))

    left, right = sizes(rows, cols, rank)
    return Basis(side(rows, left), side(cols, right))


def moved(old: Basis, products: tuple[Tensor, Tensor]) -> tuple[Basis, Tensor, Tensor]:
    """The bases after one step of orthogonal iteration.

    Args:
        old: The bases so far.
        products: Second moments of fresh gradients applied to ``A`` and to ``B``; see :meth:`Factors.moment_products`.

    Returns:
        The new bases, and ``A_new^T A_old`` and ``B_new^T B_old``.
    """
    left, left_turn = _moved_side(old.left, products[0])
    right, right_turn = _moved_side(old.right, products[1])
    return Basis(left, right), left_turn, right_turn


def turned(coordinates: Tensor, shape: tuple[int, int], left: Tensor, right: Tensor) -> Tensor:
    """Coordinates ``(n, k_a k_b)`` in moved bases."""
    return (left @ coordinates.unflatten(1, shape) @ right.T).flatten(1)


def _moved_side(old: Side, product: Tensor) -> tuple[Side, Tensor]:
    identity = torch.eye(old.basis.shape[1], dtype=old.basis.dtype, device=old.basis.device)
    if old.complete:
        return old, identity
    basis, moment, wide = old.basis.double(), old.moment.double(), product.double()
    # Scaled to unit size: gradients shrink by orders of magnitude in early training, and large old ones would hold the bases.
    tiny = torch.finfo(torch.float64).tiny
    mixed = _DECAY * (basis @ moment) + (1.0 - _DECAY) * wide / wide.norm().clamp(min=tiny)
    # A little of the previous basis stands in for directions that the products do not have.
    fresh = torch.linalg.qr(mixed / mixed.norm().clamp(min=tiny) + 1e-6 * basis).Q
    turn = fresh.T @ basis
    rotated = (fresh.T @ mixed) @ turn.T
    # Non-finite gradients must not replace good bases.
    healthy = fresh.isfinite().all() & rotated.isfinite().all()
    fresh, rotated, turn = (
        torch.where(healthy, new, kept).to(old.basis.dtype).contiguous()
        for new, kept in ((fresh, basis), (0.5 * (rotated + rotated.T), moment), (turn, identity.double()))
    )
    return Side(fresh, rotated), turn
