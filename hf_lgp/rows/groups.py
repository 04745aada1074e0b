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
    """Group the rows of each example by which parts of the sequence they resemble; the first row stays by itself.

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
    code = 1 + code % groups
    code[:, 0] = 0
    return F.one_hot(code, 1 + groups).to(torch.promote_types(hidden.dtype, torch.float32))


@lru_cache(maxsize=256)
def _alone(groups: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Membership of rows with a group of their own behind ``groups`` others: shape ``(R, groups + R)``."""
    return torch.eye(groups + rows, dtype=dtype, device=device)[groups:]


def follow_singly(member: Tensor, asked: Tensor, rows: int) -> Tensor:
    """Membership with a group of its own for each of the rows that were asked most: shape ``(m, T, 1 + K + R)``, ``R = min(rows, T - 1)``.

    Args:
        member: Membership, shape ``(m, T, 1 + K)``.
        asked: Sizes of the gradients that each row received so far, shape ``(m, T, 1)``, in any unit.
        rows: How many to take out of their groups; the first row is one already.
    """
    rows = min(rows, member.shape[1] - 1)
    if rows == 0:
        return member
    alone = _alone(member.shape[2], rows, member.dtype, member.device).expand(len(member), -1, -1)
    which = asked[:, 1:].topk(rows, dim=1).indices.expand_as(alone)
    followed = F.pad(member, (0, rows))
    followed[:, 1:].scatter_(1, which, alone)
    return followed


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
