"""The walk: from the last block to the first, each block itself is called on a few rows while its attention reads all rows.

At each block ``S = 1 + R + K`` rows per example are followed: the row that most is asked of behind the stack, such as a class token, the ``R`` others that were
asked most so far, each by itself, and ``K`` means of groups of the rest. Autograd gives the gradients of the block's parameters, of the followed rows, and of the rows that attention reads. A group's
gradient is the sum over its rows; the row that stands for it is their mean, weighted by what each was asked so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block import run_rows
from .groups import each_row, follow_singly, group_rows, mean_rows, row_weights
from .leaves import Leaves, Run, by_group, expanded, run_eagerly
from .norms import Norm, is_layer_norm, norm_of_means, noted_norm
from .notes import BlockNotes
from .parts import BlockParts, Intercept

_SMALL = 1e-20
"""What a row counts that nothing was asked of: where that holds for a whole group, its rows count alike."""

_ALWAYS = 1e30
"""What the row counts that is followed by itself in every block."""


@dataclass(frozen=True)
class RowBudget:
    """How many rows of each example are followed besides the one asked most: ``singly`` is ``R``, ``groups`` is ``K``."""

    groups: int
    singly: int = 0

    def doubled(self, times: int) -> RowBudget:
        """Twice as many of both, so often."""
        return RowBudget(self.groups << times, self.singly << times)


@dataclass(frozen=True)
class HowToWalk:
    """How blocks are run on rows, and which rows are followed."""

    budget: RowBudget
    intercept: Intercept  # gives a context in which attention goes to another function
    vectorized: bool = True  # whether ``torch.vmap`` runs the blocks on groups of examples
    half: torch.dtype | None = None  # what autocast casts to in the forward; None where it is off
    run: Run = run_eagerly  # how functions of a block are called
    loud: bool = False  # whether predictions that are not finite are left to be seen


@dataclass(frozen=True)
class Walked:
    """What the walk found at one block."""

    index: int  # of the block
    of_hidden: Tensor | None  # gradient of the rows that entered it, ``(m, T, D)``; None if that is not wanted
    own: Mapping[int, Tensor | None]  # of leaves, by parameter; of each group, ``(G, ...)``, where there are groups


def walk(
    parts: Sequence[BlockParts],
    notes: Sequence[BlockNotes],
    delta: Tensor,
    leaves: Leaves,
    how: HowToWalk,
    first: int = 0,
    needs_input: bool = True,
    groups: int = 0,
) -> Iterator[Walked]:
    """Predicted gradients of a stack's input and parameters, block by block: ``sum_i`` of the predictor's ``J_i^T delta_i``.

    Args:
        parts: The blocks; the last comes first.
        notes: What each noted of ``m`` examples.
        delta: Gradient of the stack's output, perhaps with a weight for each example; shape ``(m, T, D)``.
        leaves: What stands for the blocks' parameters.
        how: Which rows are followed, and how a block is run on them.
        first: The block below which nothing is wanted.
        needs_input: Whether the gradient of the rows that enter that block is.
        groups: Sums over examples are taken for each of so many groups by itself; 0 for over all.
    """
    wide = torch.promote_types(delta.dtype, torch.float32)  # ranks must not depend on a weight's rounding
    asked = delta.norm(dim=-1, keepdim=True, dtype=wide) + _SMALL
    read = asked.argmax(1, keepdim=True)
    asked.scatter_(1, read, _ALWAYS)
    singly, hidden = 1 + how.budget.singly, notes[min(1, len(notes) - 1)].hidden
    every = hidden.shape[1] <= singly + how.budget.groups
    member = each_row(hidden) if every else group_rows(hidden, how.budget.groups)
    for i in reversed(range(first, len(parts))):
        followed = member if every else follow_singly(member, asked, singly)
        weights = row_weights(followed, asked)
        arriving = followed.mT.to(delta.dtype) @ delta
        of_rows, of_hidden, own = _walk_block(
            parts[i], notes[i] if every else notes[i].met_by(read), weights, arriving, leaves, how, groups
        )
        if i == first and not needs_input:
            yield Walked(i, None, own)
            return
        asked = asked + of_hidden.norm(dim=-1, keepdim=True, dtype=wide)
        delta = of_hidden.baddbmm_(weights.to(of_hidden.dtype), of_rows.to(of_hidden.dtype))
        yield Walked(i, delta, own)


def _walk_block(
    parts: BlockParts, notes: BlockNotes, weights: Tensor, arriving: Tensor, leaves: Leaves, how: HowToWalk, groups: int
) -> tuple[Tensor, Tensor, dict[int, Tensor | None]]:
    """Gradients of the followed rows ``(m, S, D)``, of all rows as attention reads them ``(m, T, D)``, and of leaves."""
    keys = [id(p) for p in parts.block.parameters() if p.requires_grad]
    leaves = expanded(leaves, parts.block, groups) if groups else leaves

    def run(hidden: Tensor, rows: Tensor, weights: Tensor, *noted: Tensor) -> Tensor:
        return _rows_of_block(parts, notes.of(noted, not groups), how, hidden, rows, weights)

    def pulled(hidden: Tensor, weights: Tensor, arriving: Tensor, *noted: Tensor) -> Any:
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            rows = mean_rows(weights, hidden.detach()).requires_grad_()
            given = [hidden, rows, weights, *noted]
            out = by_group(parts.block, leaves, groups, run, given, how.vectorized) if groups else run(*given)
        own = [leaves[key] for key in keys] if groups else [p for p in parts.block.parameters() if p.requires_grad]
        return torch.autograd.grad(out, [rows, hidden, *own], arriving.to(out.dtype), allow_unused=True)

    tensors = [notes.hidden, weights, arriving, *notes.tensors(not groups)]
    if groups:
        of_rows, of_hidden, *of_own = pulled(*tensors)
    else:
        kind = f"walk of {weights.shape[2]} rows"
        of_rows, of_hidden, *of_own = how.run(kind, parts.block, leaves, pulled, tensors, lambda: notes.fixed(how.half))
    # A block that is left out at random hands its rows on.
    of_rows = torch.zeros_like(arriving) if of_rows is None else of_rows
    of_hidden = torch.zeros_like(notes.hidden) if of_hidden is None else of_hidden
    return of_rows, of_hidden, dict(zip(keys, of_own, strict=True))


def _rows_of_block(
    parts: BlockParts, notes: BlockNotes, how: HowToWalk, hidden: Tensor, rows: Tensor, weights: Tensor
) -> Tensor:
    """A block's output for the followed rows, with a graph from them, from all rows as attention reads them and from its parameters."""
    x, normal = hidden, None
    if is_layer_norm(parts.front):
        front = Norm(parts.front, True)
        x, scale = noted_norm(front, hidden)
        normal = norm_of_means(front, rows, mean_rows(weights, scale))
    with torch.autocast(hidden.device.type, dtype=how.half, enabled=how.half is not None, cache_enabled=False):
        if parts.front is not None and normal is None:
            x = parts.front(hidden)
            normal = mean_rows(weights, x)
        out = run_rows(parts, notes, x, rows, normal, weights, how.intercept)
    return out[0] if isinstance(out, tuple) else out
