"""One call of a stack: control examples with a graph, the others without, notes for the walk, and formula (1) as the backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .control.measurement import Comparison, GroupSpread
from .control.plan import StepPlan, draw_order, identity_order, private_seed
from .estimator import control_scale, control_size, control_weights
from .rows.leaves import leaves_of
from .rows.notes import BlockNotes, StreamNotes, map_tensors
from .rows.parts import BlockParts
from .rows.walk import HowToWalk, Walked, walk
from .sealed import Sealed, SpliceError
from .splice import Gradients, Spliced
from .streams import ControlStream, Stream

_TOGETHER = 2
"""Examples of a group, at most: by their number the ratio of variances is known no better, and they cost memory and time."""

Observed = Callable[[GroupSpread], None]
"""Is told what a measuring call measured."""


class Call:
    """What one call of a stack knows: what a backward needs belongs to it, never to the module.

    ``h0 (m, T, D)`` enters the first of ``parts``, the blocks whose gradients are predicted; ``number`` is that of this call within the step: every call draws its own
    control examples. The model carries :attr:`sealed` from block to block.
    """

    def __init__(
        self,
        parts: Sequence[BlockParts],
        unbatched: frozenset[int | str],
        plan: StepPlan,
        number: int,
        h0: Tensor,
        how: HowToWalk,
        observed: Observed,
    ) -> None:
        kind = h0.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.parts, self.unbatched, self.observed = parts, unbatched, observed
        self.how = replace(how, half=half, budget=how.budget.doubled(plan.rows))
        self.m, self.controls = len(h0), control_size(len(h0), plan.fraction)
        self.whole = self.controls == self.m
        seed, device = private_seed(plan.seed, number), h0.device
        self.order, self.inverse = identity_order(self.m, device) if self.whole else draw_order(self.m, seed, device)
        self.h0, self.sealed = h0, Sealed.of(h0)
        blocks = [part.block for part in parts]
        self.parameters = {id(p): p for block in blocks for p in block.parameters() if p.requires_grad}
        self.leaves = leaves_of(blocks, half)
        trained = (i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
        self.first = 0 if h0.requires_grad else next(trained, len(parts))
        groups = min(plan.measure, self.controls)
        apart = min(_TOGETHER, self.controls // groups) * groups if groups else 0
        rows = h0.detach() if self.whole else h0.detach().index_select(0, self.order)
        bounds = [slice(0, apart), slice(apart, self.controls), slice(self.controls, self.m)]
        grouped, control, others = (slice_ if slice_.start < slice_.stop else None for slice_ in bounds)
        self.control = [
            ControlStream(part, rows[part], self.how, groups if part is grouped else 0)
            for part in (grouped, control)
            if part is not None
        ]
        self.streams = [*self.control, *([Stream(others, rows[others], self.how)] if others is not None else [])]
        self.notes: list[BlockNotes] = []
        self.inner: list[weakref.ref[Tensor]] = []  # where no gradient must arrive but by :meth:`_pull`
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def done(self) -> int:
        """Number of blocks that were run."""
        return len(self.notes)

    def block(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """Run all streams through the next block.

        Returns:
            What it returns besides its rows; None where it returns them alone.

        Raises:
            SpliceError: If there is something in that.
        """
        part = self.parts[self.done]
        args = tuple(self._ordered(key, value) for key, value in enumerate(args, start=1))
        kwargs = {key: self._ordered(key, value) for key, value in kwargs.items()}
        batched = frozenset(id(ordered) for ordered, _ in self._selected.values())
        whole = len(self.streams) == 1
        hidden = self._noted([stream.rows for stream in self.streams])
        notes = BlockNotes(hidden, args, kwargs, batched, StreamNotes({}, {}))
        needs_input = self._needs_input(self.done)
        # Control examples last: who listens within a block keeps theirs, which has a graph, so that its use is noticed.
        told = [
            stream.block(part, forward, notes if whole else notes.take(stream.examples), self.leaves, needs_input)
            for stream in reversed(self.streams)
        ][::-1]
        noted = [each for _, each in told]
        stream = noted[0] if whole else tree_map(lambda *t: torch.cat(t), *noted)
        self.notes.append(replace(notes, stream=stream))
        return told[0][0]

    def _noted(self, rows: Sequence[Tensor]) -> Tensor:
        """What enters a block, for the walk: under autocast to bfloat16 in that, which has the range of float32."""
        if self.how.half != torch.bfloat16:
            return rows[0] if len(rows) == 1 else torch.cat(list(rows))
        noted = torch.empty(self.h0.shape, dtype=self.how.half, device=self.h0.device)
        for stream, own in zip(self.streams, rows, strict=True):
            noted[stream.examples].copy_(own)
        return noted

    def _ordered(self, key: int | str, value: Any) -> Any:
        """An argument of a block with its examples in the call's order."""

        def asks(t: Any) -> Any:
            if isinstance(t, Tensor) and t.requires_grad:
                raise SpliceError("its blocks are given something besides their rows that asks for a gradient")
            return t

        def select(t: Any) -> Any:
            if not isinstance(asks(t), Tensor) or t.dim() == 0 or len(t) != self.m:
                return t
            if id(t) not in self._selected:
                self._selected[id(t)] = (t if self.whole else t.index_select(0, self.order), t)
            return self._selected[id(t)][0]

        return map_tensors(asks if key in self.unbatched else select, value)

    def finish(self) -> Tensor:
        """The stack's output for all examples, in their own order, shape ``(m, T, D)``."""
        self._selected.clear()
        self.inner = [weakref.ref(t) for stream in self.control for t in stream.inner]
        left = [stream.rows for stream in self.streams]
        value = left[0]
        if len(left) > 1:
            value = value.new_empty(self.m, *value.shape[1:])
            for stream, rows in zip(self.streams, left, strict=True):
                value.index_copy_(0, self.order[stream.examples], rows.to(value.dtype))
        return Spliced.apply(self.h0, lambda: value, self._pull, *self.parameters.values())

    def _needs_input(self, i: int) -> bool:
        """Whether the gradient of what enters a block is wanted."""
        return i > self.first or (i == self.first and self.h0.requires_grad)

    def _walk(self, delta: Tensor, notes: Sequence[BlockNotes], groups: int = 0) -> Iterator[Walked]:
        needs_input = self._needs_input(self.first)
        return walk(self.parts, notes, delta, self.leaves, self.how, self.first, needs_input, groups)

    def _pull(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Formula (1): from ``dL/dH``, the estimated gradients of ``h0`` and of the parameters."""
        gradients = Gradients(self.parameters, loud=self.how.loud or self.how.half == torch.float16)
        comparison, m = Comparison(), self.m
        walked: Iterator[Walked] | None = None
        if not self.whole:
            delta = delta.index_select(0, self.order)
            weights = control_weights(m, self.controls, delta.dtype, delta.device)
            walked = self._walk(delta * weights.view(m, 1, 1), self.notes)
            delta = control_scale(m, self.controls) * delta[: self.controls]
        arrived: list[Any] = [delta[stream.examples] for stream in self.control]
        compared: Iterator[Walked] | None = None
        if self.control[0].groups:
            notes = [block.take(self.control[0].examples) for block in self.notes]
            compared = self._walk(arrived[0], notes, self.control[0].groups)
        of_rows = None
        for _ in range(self.first, len(self.parts)):
            exact: dict[int, Tensor | None] = {}
            for k, stream in enumerate(self.control):
                arrived[k], own = stream.pull(arrived[k])
                if compared is not None and stream.groups:
                    own = self._compare(comparison, stream.groups, next(compared), own, arrived[k])
                exact = {key: _added(g, own[key]) for key, g in exact.items()} if exact else own
            if walked is None:
                gradients.add_exact(exact)
            else:
                step = next(walked)
                gradients.add(exact, step.own)
                of_rows = step.of_hidden
        if compared is not None:
            self.observed(comparison.spread())
        of_h0, of_parameters = gradients.totals(of_rows)
        if not self._needs_input(self.first):
            return None, of_parameters
        if of_h0 is None:
            return arrived[0] if len(arrived) == 1 else torch.cat(arrived), of_parameters
        of_h0 = of_h0.to(self.h0.dtype)
        for stream, rows in zip(self.control, arrived, strict=True):
            of_h0[stream.examples] += rows
        return of_h0.index_select(0, self.inverse), of_parameters

    def _compare(
        self, comparison: Comparison, groups: int, step: Walked, exact: dict[int, Tensor | None], of_rows: Tensor | None
    ) -> dict[int, Tensor | None]:
        """Compare a block's gradients group by group, and those of the rows that entered the first; gives the sums of the exact ones."""
        later = {id(p) for part in self.parts[self.first : step.index] for p in part.block.parameters()}
        # The same tensors in every process, whatever its examples reach.
        whole = {
            k: self.leaves[k].new_zeros(groups, *self.leaves[k].shape) if g is None else g for k, g in exact.items()
        }
        sums = comparison.add(whole, step.own, later)
        if step.index == self.first and of_rows is not None and step.of_hidden is not None:
            one, other = (t.unflatten(0, (groups, -1)).sum(1) for t in (of_rows, step.of_hidden))
            comparison.add({0: one}, {0: other}, ())
        return {key: None if g is None else sums.get(key) for key, g in exact.items()}


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
