"""What followed rows ask of a block's rows: products of few rows per head, summed over groups without row-by-row gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """What one kind of query asks of a block's rows: row ``t`` receives ``sum_r mixers_{r,t} directions_r``.

    Attributes:
        mixers: Shape ``(m, R, T)``.
        directions: Shape ``(m, R, D)``.
        along: Inner products of directions and normalised rows, shape ``(m, R, T)``.
    """

    mixers: Tensor
    directions: Tensor
    along: Tensor


@dataclass(frozen=True)
class AskedRows:
    """Gradient of a block's rows, after the norm without its affine map, as far as the followed rows read them.

    Row ``t`` receives ``ds_t u`` as a key and ``a_t d(pooled)`` as a value from every head of every followed row, and from a followed
    row that is a mean of rows its share of what that mean receives.

    Attributes:
        parts: These three, or the first two.
    """

    parts: tuple[Asked, ...]

    def rows(self, normalised: Tensor, spread: Tensor) -> Tensor:
        """Gradient of the rows before the norm, row by row, shape ``(m, T, D)``.

        Args:
            normalised: The normalised rows, shape ``(m, T, D)``.
            spread: Reciprocal standard deviations of the rows, shape ``(m, T, 1)``.
        """
        through = normalised * -self._pull(normalised, spread)
        for part in self.parts:
            centred = part.directions - part.directions.mean(-1, keepdim=True)
            through = through.baddbmm_((part.mixers * spread.to(part.mixers.dtype).mT).mT, centred)
        return through

    def totals(self, normalised: Tensor, spread: Tensor, groups: Tensor) -> Tensor:
        """Sums of :meth:`rows` over groups of rows, shape ``(m, K, D)``, without forming them.

        Args:
            normalised: The normalised rows, shape ``(m, T, D)``.
            spread: Reciprocal standard deviations of the rows, shape ``(m, T, 1)``.
            groups: 1 where a row belongs to a group, else 0, shape ``(m, T, K)``.
        """
        spreads = groups * spread.to(groups.dtype)
        first, *rest = ((part.mixers @ spreads).mT @ part.directions for part in self.parts)
        arriving = sum(rest, first)
        pulled = (groups * self._pull(normalised, spread)).mT @ normalised
        return arriving - arriving.mean(-1, keepdim=True) - pulled

    def _pull(self, normalised: Tensor, spread: Tensor) -> Tensor:
        """How much of a row's own direction the norm takes out of what the row receives, shape ``(m, T, 1)``."""
        first, *rest = ((part.mixers * part.along).sum(1) for part in self.parts)
        own = sum(rest, first)[..., None]
        return own * spread.to(own.dtype) / normalised.shape[-1]

    def sizes(self, spread: Tensor) -> Tensor:
        """A bound on the size of what each row receives, shape ``(m, T, 1)``."""
        bound = torch.zeros_like(spread)
        for part in self.parts:
            lengths = torch.linalg.vector_norm(part.directions, dim=-1, keepdim=True)
            bound = bound.baddbmm_(part.mixers.abs().to(spread.dtype).mT, lengths.to(spread.dtype))
        return bound * spread
