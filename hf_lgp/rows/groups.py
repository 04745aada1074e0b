"""How the rows of a sequence are grouped, and how much of its group's row each of them is."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-20
"""What a row counts that nothing was asked of: where that holds for a whole group, its rows count alike."""


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


def follow_singly(member: Tensor, asked: Tensor, rows: int) -> Tensor:
    """Membership with a group of its own for each of the rows that were asked most: shape ``(m, T, 1 + K + R)``, ``R = min(rows, T - 1)``.

    Args:
        member: Membership, shape ``(m, T, 1 + K)``.
        asked: Sizes of the gradients that each row received so far, shape ``(m, T, 1)``, in any unit.
        rows: How many to take out of their groups; the first row is one already.
    """
    rows = min(rows, member.shape[1] - 1)
    single = member.new_zeros(len(member), member.shape[1], rows)
    single[:, 1:].scatter_(1, asked[:, 1:, 0].topk(rows, dim=1).indices[:, None], 1.0)
    return torch.cat([member * (1.0 - single.sum(-1, keepdim=True)), single], -1)


def row_weights(member: Tensor, asked: Tensor) -> Tensor:
    """How much of its group's row each row is: in proportion to what it was asked so far.

    Args:
        member: Membership, shape ``(m, T, S)``.
        asked: Sizes of the gradients that each row received so far, shape ``(m, T, 1)``, in any unit.
    """
    return F.normalize(member * (asked + _SMALL), p=1.0, dim=1, eps=1e-30)
