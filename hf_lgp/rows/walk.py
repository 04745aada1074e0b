"""The walk: from the last block to the first, each block itself is called on a few rows while its attention reads all rows.

At each block ``S = 1 + K + R`` rows per example are followed: the first row, ``K`` means of groups of the others, and the ``R`` rows that were
asked most so far, each by itself. Autograd gives the gradients of the block's parameters, of the followed rows, and of the rows that attention reads. A group's
gradient is the sum over its rows; the row that stands for it is their mean, weighted by what each was asked so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block import run_rows
from .groups import follow_singly, group_rows, row_weights
from .norms import norm_of_means, noted_norm
from .notes import BlockNotes
from .parts import BlockParts, Intercept


@dataclass(frozen=True)
class RowBudget:
    """How many rows of each example are followed besides the first: ``singly`` is ``R``, ``groups`` is ``K``."""

    groups: int
    singly: int = 0


def walk(
    parts: Sequence[BlockParts],
    notes: Sequence[BlockNotes],
    delta: Tensor,
    parameters: Sequence[nn.Parameter],
    budget: RowBudget,
    needs_input: bool,
    intercept: Intercept,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Predicted gradients of a stack's input and parameters: ``sum_i`` of the predictor's ``J_i^T delta_i``.

    ``delta (m, T, D)`` is the gradient of the stack's output, perhaps with a weight for each example.
    The input's gradient is None if it is not wanted, and a parameter's where there is none.
    """
    wanted = {id(parameter) for parameter in parameters}
    of_block = [[p for p in part.block.parameters() if id(p) in wanted] for part in parts]
    first = 0 if needs_input else next(i for i, own in enumerate(of_block) if own)
    groups = group_rows(notes[min(1, len(notes) - 1)].hidden, budget.groups)
    wide = torch.promote_types(delta.dtype, torch.float32)  # ranks must not depend on a weight's rounding
    asked = delta.norm(dim=-1, keepdim=True, dtype=wide)
    sums: dict[int, Tensor] = {}  # by parameter: blocks may share some
    for i in reversed(range(first, len(parts))):
        member = follow_singly(groups, asked, budget.singly)
        weights = row_weights(member, asked)
        arriving = member.mT.to(delta.dtype) @ delta
        of_rows, of_hidden, own = _walk_block(parts[i], notes[i], weights, arriving, of_block[i], intercept)
        for parameter, gradient in zip(of_block[i], own, strict=True):
            if gradient is not None:
                sums[id(parameter)] = sums[id(parameter)] + gradient if id(parameter) in sums else gradient
        if i == first and not needs_input:
            break
        asked = asked + of_hidden.norm(dim=-1, keepdim=True, dtype=wide)
        delta = of_hidden.baddbmm_(weights.to(of_hidden.dtype), of_rows.to(of_hidden.dtype))
    return delta if needs_input else None, [sums.get(id(p)) for p in parameters]


def _walk_block(
    parts: BlockParts,
    notes: BlockNotes,
    weights: Tensor,
    arriving: Tensor,
    parameters: Sequence[nn.Parameter],
    intercept: Intercept,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Gradients of the followed rows ``(m, S, D)``, of all rows as attention reads them ``(m, T, D)``, and of parameters."""
    hidden = notes.hidden.detach().requires_grad_()
    turned = weights.mT.to(hidden.dtype)
    with torch.enable_grad():
        rows = (turned @ notes.hidden).requires_grad_()
        x, normal = hidden, None
        if isinstance(parts.front, nn.LayerNorm):
            x, scale = noted_norm(parts.front, hidden)
            normal = norm_of_means(parts.front, rows, turned.to(scale.dtype) @ scale)
        elif parts.front is not None:
            x = parts.front(hidden)
            normal = turned.to(x.dtype) @ x
        out = run_rows(parts, notes, x, rows, normal, weights, intercept)
        out = out[0] if isinstance(out, tuple) else out
    of_rows, of_hidden, *own = torch.autograd.grad(
        out, [rows, hidden, *parameters], arriving.to(out.dtype), allow_unused=True
    )
    # A block that is left out at random hands its rows on.
    return of_rows, torch.zeros_like(hidden) if of_hidden is None else of_hidden, own
