"""How the rows of a sequence are grouped, and how much of its group's row each of them is."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=4096)  # every length that a run meets
def _patterns(length: int, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``bits`` square waves of 1, 2, ... periods along the sequence, centred, 0 at the first row: shape ``(bits, length)``."""
    at = torch.arange(length - 1, dtype=torch.float32, device=device) / (length - 1)
    waves = torch.stack([(at * 2 * torch.pi * (bit + 1) + 0.1).sin().sign() for bit in range(bits)])
    return F.pad(waves - waves.mean(1, keepdim=True), (1, 0)).to(dtype)


def group_rows(hidden: Tensor, groups: int) -> Tensor:
    """Group the rows of each example by which parts of the sequence they resemble: shape ``(m, T, K)``, 1 where a row is in a group.

    A row's code has one bit per pattern: whether it lies further along the contrast of the sequence's parts that the pattern tells apart than
    the example's mean row. Neighbouring, similar rows come together. Every example is grouped by itself.

    Args:
        hidden: Rows, shape ``(m, T, D)`` with ``T >= 2``.
        groups: ``K >= 1``.
    """
    bits = max(1, (groups - 1).bit_length())
    normal = F.layer_norm(hidden, hidden.shape[-1:])
    contrasts = _patterns(hidden.shape[1], bits, normal.dtype, normal.device) @ normal
    along = normal @ contrasts.mT
    beyond = along > along[:, 1:].mean(1, keepdim=True)
    code = beyond[..., 0].long()
    for bit in range(1, bits):
        code = code + (beyond[..., bit].long() << bit)
    return F.one_hot(code % groups, groups).to(torch.promote_types(hidden.dtype, torch.float32))


def each_row(hidden: Tensor) -> Tensor:
    """Membership with a group of its own for every row, in their order."""
    rows = hidden.shape[1]
    return torch.eye(rows, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device).expand(
        len(hidden), -1, -1
    )


@lru_cache(maxsize=256)
def _alone(rows: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Membership of rows with a group of their own before ``groups`` others: shape ``(R, R + groups)``."""
    return torch.eye(rows, rows + groups, dtype=dtype, device=device)


def follow_singly(member: Tensor, asked: Tensor, rows: int) -> Tensor:
    """Membership with a group of its own for each of the ``R`` rows that were asked most, which come first: shape ``(m, T, R + K)``.

    Args:
        member: Membership, shape ``(m, T, K)``.
        asked: Sizes of the gradients that each row received so far, shape ``(m, T, 1)``, in any unit.
        rows: ``R``.
    """
    alone = _alone(rows, member.shape[2], member.dtype, member.device).expand(len(member), -1, -1)
    which = asked.topk(rows, dim=1).indices.expand_as(alone)
    return F.pad(member, (rows, 0)).scatter_(1, which, alone)


def row_weights(member: Tensor, asked: Tensor) -> Tensor:
    """How much of its group's row each row is: in proportion to what it was asked so far.

    Args:
        member: Membership, shape ``(m, T, S)``.
        asked: Sizes of the gradients that each row received so far, shape ``(m, T, 1)``, in any unit, none of them zero.
    """
    weights = member * asked
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-30)


def mean_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted means of rows ``(m, T, D)``: shape ``(m, S, D)``, in the rows' dtype, autocast or not."""
    with torch.autocast(rows.device.type, enabled=False):
        return weights.mT.to(rows.dtype) @ rows
