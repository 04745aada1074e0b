"""Streams of examples through a stack of blocks: each runs its examples in its own way, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows.block import noting
from .rows.leaves import Leaves, by_group, expanded
from .rows.notes import BlockNotes, StreamNotes
from .rows.parts import BlockParts
from .rows.walk import HowToWalk
from .sealed import SpliceError

Forward = Callable[..., Any]
Rest = tuple[Any, ...] | None
"""What a block returns besides its rows; None where it returns them alone."""

_SHORT = 256  # rows


def _run(part: BlockParts, forward: Forward, rows: Tensor, notes: BlockNotes) -> tuple[Tensor, Rest, StreamNotes]:
    with noting(part) as tell:
        out = forward(rows, *notes.args, **notes.kwargs)
    rest = out[1:] if isinstance(out, tuple) else None
    if any(item is not None for item in rest or ()):
        raise SpliceError("its blocks return more than their rows")
    out = out[0] if isinstance(out, tuple) else out
    if out is rows:
        raise SpliceError("its blocks are left out at random")
    return out, rest, tell()


class Stream:
    """Examples that have no graph.

    Attributes:
        examples: Which, in the order of the call.
        rows: What enters the next block, shape ``(n, T, D)``, without a graph.
    """

    def __init__(self, examples: slice, rows: Tensor, how: HowToWalk) -> None:
        self.examples, self.rows, self._how = examples, rows, how

    def block(
        self, part: BlockParts, forward: Forward, notes: BlockNotes, leaves: Leaves, needs_input: bool
    ) -> tuple[Rest, StreamNotes]:
        """Run a block, whose forward this is; :class:`SpliceError` if it returns something besides its rows."""
        with torch.no_grad():
            self.rows, rest, told = self._run("others", part, forward, notes, leaves, self.rows)
        return rest, told

    def _run(
        self, kind: str, part: BlockParts, forward: Forward, notes: BlockNotes, leaves: Leaves, rows: Tensor
    ) -> tuple[Tensor, Rest, StreamNotes]:
        def function(rows: Tensor, *noted: Tensor) -> Any:
            # A block may change its input in place, but not a leaf.
            with torch.autocast(rows.device.type, dtype=how.half, enabled=how.half is not None, cache_enabled=False):
                rows = rows.clone() if rows.requires_grad else rows
                return _run(part, forward, rows, notes.of(noted, True))

        how, tensors = self._how, [rows, *notes.tensors(True)]
        return how.run(kind, part.block, leaves, function, tensors, lambda: notes.fixed(how.half))


class ControlStream(Stream):
    """Control examples: every block has a graph of its own, so that the backward goes from block to block beside the walk.

    With ``groups``, the examples are in so many groups of equal size, whose gradients are told apart.
    """

    def __init__(self, examples: slice, rows: Tensor, how: HowToWalk, groups: int) -> None:
        super().__init__(examples, rows, how)
        self.groups = groups
        self.graphs: list[tuple[Tensor, dict[int, Tensor], Tensor]] = []  # rows in, leaves, rows out

    def block(
        self, part: BlockParts, forward: Forward, notes: BlockNotes, leaves: Leaves, needs_input: bool
    ) -> tuple[Rest, StreamNotes]:
        entered = self.rows.detach().requires_grad_(needs_input)
        if self.groups:
            leaves, rests = expanded(leaves, part.block, self.groups), list[Rest]()

            def of_group(rows: Tensor, *noted: Tensor) -> Any:
                out, rest, told = _run(part, forward, rows.clone(), notes.of(noted))
                rests.append(rest)
                return out, told

            tensors = [entered, *notes.tensors()]
            # Of groups at once CUDA's attention may keep every weight for the backward.
            few = not entered.is_cuda or entered.shape[1] <= _SHORT
            out, noted = by_group(part.block, leaves, self.groups, of_group, tensors, self._how.vectorized and few)
            rest = rests[0]
        else:
            out, rest, noted = self._run("control", part, forward, notes, leaves, entered)
        self.graphs.append((entered, {id(p): leaves[id(p)] for p in part.block.parameters() if p.requires_grad}, out))
        self.rows = out.detach()
        return rest, noted

    def pull(self, delta: Tensor) -> tuple[Tensor | None, dict[int, Tensor | None]]:
        """One block back, from the last: gradients of the rows that entered it and of leaves, given that of its output."""
        entered, leaves, out = self.graphs.pop()
        wanted = [entered] * entered.requires_grad + list(leaves.values())
        found: list[Tensor | None] = [None] * len(wanted)
        if out.requires_grad:
            found = list(torch.autograd.grad(out, wanted, delta, allow_unused=True))
        of_rows = found.pop(0) if entered.requires_grad else None
        return of_rows, dict(zip(leaves, found, strict=True))
