"""The walk: from the last block to the first, each block itself is called on a few rows while its attention reads all rows.

At each block ``S = 1 + K + R`` rows per example are followed: the first row, ``K`` means of groups of the others, and the ``R`` rows that were
asked most so far, each by itself. Autograd gives the gradients of the block's parameters, of the followed rows, and of the rows that attention reads. A group's
gradient is the sum over its rows; the row that stands for it is their mean, weighted by what each was asked so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block import run_rows
from .groups import follow_singly, group_rows, row_weights
from .norms import norm_of_means, noted_norm
from .notes import BlockNotes
from .parts import BlockParts, Intercept

_SMALL = 1e-20
"""What a row counts that nothing was asked of: where that holds for a whole group, its rows count alike."""

Compared = Callable[[nn.Module, Callable[..., Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]
"""Calls a function of tensors on groups of examples, each with parameters of its own for a block; gives its result and these parameters."""


@dataclass(frozen=True)
class RowBudget:
    """How many rows of each example are followed besides the first: ``singly`` is ``R``, ``groups`` is ``K``."""

    groups: int
    singly: int = 0


@dataclass(frozen=True)
class Walked:
    """What the walk found at one block."""

    index: int  # of the block
    of_hidden: Tensor | None  # gradient of the rows that entered it, ``(m, T, D)``; None if that is not wanted
    own: Sequence[
        Tensor | None
    ]  # of its parameters that are wanted; for each group ``(G, ...)`` where there are groups


def walk(
    parts: Sequence[BlockParts],
    notes: Sequence[BlockNotes],
    delta: Tensor,
    parameters: Sequence[nn.Parameter],
    budget: RowBudget,
    needs_input: bool,
    intercept: Intercept,
    compared: Compared | None = None,
) -> Iterator[Walked]:
    """Predicted gradients of a stack's input and parameters, block by block: ``sum_i`` of the predictor's ``J_i^T delta_i``.

    ``delta (m, T, D)`` is the gradient of the stack's output, perhaps with a weight for each example. The last block comes first. With ``compared``, sums over
    examples are taken for each group by itself.
    """
    wanted = {id(parameter) for parameter in parameters}
    of_block = [[p for p in part.block.parameters() if id(p) in wanted] for part in parts]
    first = 0 if needs_input else next(i for i, own in enumerate(of_block) if own)
    groups = group_rows(notes[min(1, len(notes) - 1)].hidden, budget.groups)
    wide = torch.promote_types(delta.dtype, torch.float32)  # ranks must not depend on a weight's rounding
    asked = delta.norm(dim=-1, keepdim=True, dtype=wide) + _SMALL
    for i in reversed(range(first, len(parts))):
        member = follow_singly(groups, asked, budget.singly)
        weights = row_weights(member, asked)
        arriving = member.mT.to(delta.dtype) @ delta
        of_rows, of_hidden, own = _walk_block(parts[i], notes[i], weights, arriving, of_block[i], intercept, compared)
        if i == first and not needs_input:
            yield Walked(i, None, own)
            return
        asked = asked + of_hidden.norm(dim=-1, keepdim=True, dtype=wide)
        delta = of_hidden.baddbmm_(weights.to(of_hidden.dtype), of_rows.to(of_hidden.dtype))
        yield Walked(i, delta, own)


def summed(
    walked: Iterable[Walked], parts: Sequence[BlockParts], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """A whole walk's gradients of the stack's input and of the parameters, None where there is none; blocks may share parameters."""
    sums: dict[int, Tensor] = {}
    wanted = {id(parameter) for parameter in parameters}
    for step in walked:
        own = (p for p in parts[step.index].block.parameters() if id(p) in wanted)
        for parameter, gradient in zip(own, step.own, strict=True):
            if gradient is not None:
                sums[id(parameter)] = sums[id(parameter)] + gradient if id(parameter) in sums else gradient
    return step.of_hidden, [sums.get(id(p)) for p in parameters]


def _walk_block(
    parts: BlockParts,
    notes: BlockNotes,
    weights: Tensor,
    arriving: Tensor,
    parameters: Sequence[Tensor],
    intercept: Intercept,
    compared: Compared | None,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Gradients of the followed rows ``(m, S, D)``, of all rows as attention reads them ``(m, T, D)``, and of parameters."""
    hidden = notes.hidden.detach().requires_grad_()
    with torch.enable_grad():
        rows = (weights.mT.to(hidden.dtype) @ notes.hidden).requires_grad_()
        if compared is None:
            out = _rows_of_block(parts, notes, intercept, hidden, rows, weights)
        else:

            def of_group(hidden: Tensor, rows: Tensor, weights: Tensor, *noted: Tensor) -> Tensor:
                return _rows_of_block(parts, notes.of(noted), intercept, hidden, rows, weights)

            out, parameters = compared(parts.block, of_group, [hidden, rows, weights, *notes.tensors()])
    of_rows, of_hidden, *own = torch.autograd.grad(
        out, [rows, hidden, *parameters], arriving.to(out.dtype), allow_unused=True
    )
    # A block that is left out at random hands its rows on.
    return of_rows, torch.zeros_like(hidden) if of_hidden is None else of_hidden, own


def _rows_of_block(
    parts: BlockParts, notes: BlockNotes, intercept: Intercept, hidden: Tensor, rows: Tensor, weights: Tensor
) -> Tensor:
    """A block's output for the followed rows, with a graph from them, from all rows as attention reads them and from its parameters."""
    turned = weights.mT.to(hidden.dtype)
    x, normal = hidden, None
    if isinstance(parts.front, nn.LayerNorm):
        x, scale = noted_norm(parts.front, hidden)
        normal = norm_of_means(parts.front, rows, turned.to(scale.dtype) @ scale)
    elif parts.front is not None:
        x = parts.front(hidden)
        normal = turned.to(x.dtype) @ x
    out = run_rows(parts, notes, x, rows, normal, weights, intercept)
    return out[0] if isinstance(out, tuple) else out
