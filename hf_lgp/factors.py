"""Per-example gradients in factored form, never materialised.

The gradient of one example with respect to a weight matrix is a sum of outer products over its rows (tokens, patches):
``G_i = sum_t l_{i,t} r_{i,t}^T`` with ``l`` the output gradient and ``r`` the layer's input. :class:`Factors` holds ``l`` and
``r`` for a batch of examples and computes what the subspaces need from them: two-sided projections and the products of
orthogonal iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Per-example gradients ``G_i = sum_t l_{i,t} r_{i,t}^T``, shape ``(b, rows, cols)`` if they were formed.

    Attributes:
        left: ``l``, shape ``(b, T, rows)``; or indices, shape ``(b, T)`` and integer, standing for one-hot rows (an embedding
            table); or None for the identity (``T = rows``), when ``right`` is the gradient itself.
        right: ``r``, shape ``(b, T, cols)``, without the column of ones.
        rows: Number of rows of the gradient matrix.
        ones: Whether ``r`` carries an extra last entry 1: the bias, appended to the weight as a column.
    """

    left: Tensor | None
    right: Tensor
    rows: int
    ones: bool = False

    @property
    def cols(self) -> int:
        """Number of columns of the gradient matrix, the bias column included."""
        return self.right.shape[-1] + int(self.ones)

    @property
    def examples(self) -> int:
        """Number ``b`` of examples."""
        return self.right.shape[0]

    def take(self, examples: int) -> Factors:
        """The first examples' gradients; float16 is widened, since products of gradients leave its range."""
        left = None if self.left is None else _without_half(self.left[:examples])
        return Factors(left, _without_half(self.right[:examples]), self.rows, self.ones)

    def _left_times(self, matrix: Tensor) -> Tensor:
        """``L_i M`` for ``M`` of shape ``(rows, k)``: shape ``(b, T, k)``."""
        if self.left is None:
            return matrix.expand(self.examples, *matrix.shape)
        if not self.left.is_floating_point():
            return matrix[self.left]
        return self.left @ matrix.to(self.left.dtype)

    def _right_times(self, matrix: Tensor) -> Tensor:
        """``R_i M`` for ``M`` of shape ``(cols, k)`` or ``(b, cols, k)``: shape ``(b, T, k)``."""
        matrix = matrix.to(self.right.dtype)
        if not self.ones:
            return self.right @ matrix
        return self.right @ matrix[..., :-1, :] + matrix[..., -1:, :]

    def _left_transposed(self, rows: Tensor) -> Tensor:
        """``L_i^T M_i`` for ``M`` of shape ``(b, T, k)``: shape ``(b, rows, k)``."""
        if self.left is None:
            return rows
        if not self.left.is_floating_point():
            out = rows.new_zeros(self.examples, self.rows, rows.shape[-1])
            return out.scatter_add_(1, self.left[..., None].expand_as(rows), rows)
        return self.left.mT @ rows.to(self.left.dtype)

    def _right_transposed(self, rows: Tensor) -> Tensor:
        """``R_i^T M_i`` for ``M`` of shape ``(b, T, k)``: shape ``(b, cols, k)``."""
        rows = rows.to(self.right.dtype)
        product = self.right.mT @ rows
        if not self.ones:
            return product
        return torch.cat([product, rows.sum(1, keepdim=True)], dim=1)

    def project(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        """Coordinates ``C_i = A^T G_i B``, formula (7).

        Args:
            left_basis: ``A``, shape ``(rows, k_a)``.
            right_basis: ``B``, shape ``(cols, k_b)``.

        Returns:
            Coordinates, shape ``(b, k_a, k_b)``, in the dtype of the bases.
        """
        projected = self._right_times(right_basis).to(left_basis.dtype)
        if self.left is None:
            return left_basis.T @ projected
        return self._left_times(left_basis).to(left_basis.dtype).mT @ projected

    def dense(self) -> Tensor:
        """The gradients themselves, shape ``(b, rows, cols)``: for tests and small layers."""
        return self._left_transposed(_with_ones(self.right) if self.ones else self.right)

    def sketch(self, vectors: Tensor) -> Tensor:
        """``G_i V`` for ``V`` of shape ``(cols, q)``: shape ``(b, rows, q)``.

        With independent entries of mean 0 and variance ``1 / q`` in ``V``, inner products of sketches are unbiased for those of the
        gradients (Hutchinson 1989), at the cost of ``q`` columns.
        """
        return self._left_transposed(self._right_times(vectors)).to(vectors.dtype)

    def minus(self, other: Factors, scale: Tensor | float) -> Factors:
        """Gradients ``G_i - scale * G'_i`` of the same examples."""
        mine, theirs = self.left, other.left
        # The bias column stays implicit where both sides have one and rows are only appended.
        ones = self.ones and other.ones and mine is not None
        right, subtracted = (_with_ones(f.right) if f.ones and not ones else f.right for f in (self, other))
        subtracted = subtracted.to(right.dtype)
        if mine is None and theirs is None:
            return Factors(None, right - scale * subtracted, self.rows)
        if mine is None or theirs is None or not mine.is_floating_point() or not theirs.is_floating_point():
            raise ValueError("Only factors of one kind can be subtracted.")
        left = torch.cat([mine, -scale * theirs.to(mine.dtype)], dim=1)
        return Factors(left, torch.cat([right, subtracted], dim=1), self.rows, ones)

    def moment_products(self, left_basis: Tensor, right_basis: Tensor) -> tuple[Tensor, Tensor]:
        """Centred second moments applied to the bases: one power step of orthogonal iteration on either side.

        With ``G~_i = G_i - mean G``: ``(1/b) sum_i G~_i G~_i^T A`` and ``(1/b) sum_i G~_i^T G~_i B``.

        Args:
            left_basis: ``A``, shape ``(rows, k_a)``.
            right_basis: ``B``, shape ``(cols, k_b)``.

        Returns:
            The two products, shapes ``(rows, k_a)`` and ``(cols, k_b)``, in the dtype of the bases.
        """
        dtype = left_basis.dtype
        # sum_i (G_i - G)(G_i - G)^T A = sum_i G_i (Z_i - Z) with Z_i = G_i^T A and Z its mean over examples.
        from_left = self._right_transposed(self._left_times(left_basis))
        from_left = from_left - from_left.mean(0, keepdim=True)
        left_product = self._left_transposed(self._right_times(from_left)).to(dtype).mean(0)
        from_right = self._left_transposed(self._right_times(right_basis))
        from_right = from_right - from_right.mean(0, keepdim=True)
        right_product = self._right_transposed(self._left_times_each(from_right)).to(dtype).mean(0)
        return left_product, right_product

    def _left_times_each(self, matrices: Tensor) -> Tensor:
        """``L_i M_i`` for ``M`` of shape ``(b, rows, k)``: shape ``(b, T, k)``."""
        if self.left is None:
            return matrices
        if not self.left.is_floating_point():
            return matrices.gather(1, self.left[..., None].expand(-1, -1, matrices.shape[-1]))
        return self.left @ matrices.to(self.left.dtype)


def _with_ones(rows: Tensor) -> Tensor:
    """``[r; 1]``: the column of ones that stands for the bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _without_half(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
