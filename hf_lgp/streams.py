"""Streams of examples through a stack of blocks: each runs its examples in its own way, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .by_group import by_group, copies
from .control.measurement import GroupSpread, compare
from .rows.block import noting
from .rows.notes import BlockNotes, StreamNotes
from .rows.parts import BlockParts
from .rows.walk import Compared, Walked
from .sealed import SpliceError
from .splice import Apart

Forward = Callable[..., Any]
Rest = tuple[Any, ...] | None
"""What a block returns besides its rows; None where it returns them alone."""


class Stream:
    """Some examples of a call.

    Attributes:
        examples: Which, in the order of the call.
        rows: What enters the next block, shape ``(n, T, D)``.
    """

    def __init__(self, examples: slice, rows: Tensor, graph: bool) -> None:
        self.examples, self.rows, self._graph = examples, rows, graph

    def block(self, part: BlockParts, forward: Forward, notes: BlockNotes) -> tuple[Rest, StreamNotes]:
        """Run a block, whose forward this is; :class:`SpliceError` if it returns something besides its rows."""
        with torch.set_grad_enabled(self._graph):
            self.rows, rest, told = _run(part, forward, self.rows, notes)
        return rest, told


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


class ComparedStream(Stream):
    """Control examples in ``groups`` groups of equal size, whose exact and predicted gradients are compared.

    Every block has a graph of its own, so that the backward goes from block to block beside the walk, and no more than one block's gradients by group are kept.
    """

    def __init__(self, examples: slice, rows: Tensor, groups: int, vectorized: bool) -> None:
        super().__init__(examples, rows.detach(), True)
        self.groups, self.vectorized = groups, vectorized
        self._graphs: list[tuple[Tensor, list[Tensor], Tensor]] = []  # rows in, parameters by group, rows out

    def _by_group(self, block: nn.Module, function: Forward, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        own = copies(block, self.groups)
        return by_group(block, own, self.groups, function, tensors, self.vectorized), list(own.values())

    def block(self, part: BlockParts, forward: Forward, notes: BlockNotes) -> tuple[Rest, StreamNotes]:
        rests: list[Rest] = []

        def of_group(rows: Tensor, *noted: Tensor) -> Any:
            out, rest, told = _run(part, forward, rows, notes.of(noted))
            rests.append(rest)
            return out, told.scales, told.kept

        entered = self.rows.detach().requires_grad_()
        (out, scales, kept), own = self._by_group(part.block, of_group, [entered, *notes.tensors()])
        self._graphs.append((entered, own, out))
        self.rows = out.detach()
        return rests[0], StreamNotes(scales, kept)

    def joined(
        self,
        control: Tensor,
        parts: Sequence[BlockParts],
        parameters: Sequence[nn.Parameter],
        walked: Callable[[Tensor, Compared], Iterator[Walked]],
        observed: Callable[[GroupSpread], None],
    ) -> Tensor:
        """The last block's output as a function of ``control``, what entered the first, and of the parameters.

        Its backward walks, given ``delta`` and a function for calling blocks group by group, and tells what it measured.
        """
        trained = [[id(p) for p in part.block.parameters() if p.requires_grad] for part in parts]

        def pull(delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
            totals: dict[int, Tensor] = {}
            spreads: list[GroupSpread] = []
            pending: dict[int, tuple[Tensor, Tensor]] = {}  # blocks may share parameters

            def settle(keys: list[int]) -> None:
                if keys:
                    sums, spread = compare(*zip(*map(pending.pop, keys), strict=True))
                    totals.update(zip(keys, sums, strict=True))
                    spreads.append(spread)

            arrived = delta
            for step in walked(delta, self._by_group):
                entered, own, out = self._graphs[step.index]
                arrived, *exact = torch.autograd.grad(out, [entered, *own], arrived, allow_unused=True)
                for key, g, p in zip(trained[step.index], exact, step.own, strict=True):
                    if g is not None:
                        p = torch.zeros_like(g) if p is None else p
                        pending[key] = (pending[key][0] + g, pending[key][1] + p) if key in pending else (g, p)
                below = {key for keys in trained[: step.index] for key in keys}
                settle([key for key in pending if key not in below])
            if step.of_hidden is not None:
                exact_rows, of_rows = (t.unflatten(0, (self.groups, -1)).sum(1) for t in (arrived, step.of_hidden))
                pending[0] = exact_rows, of_rows
                settle([0])
            together = (torch.cat([getattr(s, name) for s in spreads]) for name in ("residual", "total"))
            observed(GroupSpread(*together))
            return arrived if step.of_hidden is not None else None, [totals.get(id(p)) for p in parameters]

        return Apart.apply(control, self.rows, pull, *parameters)
