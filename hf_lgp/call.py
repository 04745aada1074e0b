"""One call of a stack: control examples with a graph, the others without, notes for the walk, and formula (1) as the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .control.measurement import Comparison, GroupSpread
from .control.plan import StepPlan, draw_order, identity_order, private_seed
from .estimator import control_size, control_weights
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
        bounds = (0, apart, groups), (apart, self.controls, 0)
        self.control = [ControlStream(slice(a, b), rows[a:b], self.how, of) for a, b, of in bounds if a < b]
        others = [] if self.whole else [Stream(slice(self.controls, self.m), rows[self.controls :], self.how)]
        self.streams = [*self.control, *others]
        self.notes: list[BlockNotes] = []  # of the blocks that were run
        self.inner: list[Tensor] = []  # where no gradient must arrive but by :meth:`_pull`
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}

    def block(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """Run all streams through the next block.

        Returns:
            What it returns besides its rows; None where it returns them alone.

        Raises:
            SpliceError: If there is something in that.
        """
        i = len(self.notes)
        args = tuple(self._ordered(key, value) for key, value in enumerate(args, start=1))
        kwargs = {key: self._ordered(key, value) for key, value in kwargs.items()}
        batched = frozenset(id(ordered) for ordered, _ in self._selected.values())
        whole = len(self.streams) == 1
        rows = [stream.rows for stream in self.streams]
        # The walk reads them under autocast; of the half types bfloat16 alone has the range of float32.
        dtype = torch.bfloat16 if self.how.half == torch.bfloat16 else rows[0].dtype
        hidden = rows[0].to(dtype) if whole else torch.cat(rows, out=rows[0].new_empty(self.h0.shape, dtype=dtype))
        notes = BlockNotes(hidden, args, kwargs, batched, StreamNotes({}, {}))
        needs_input = i > self.first or self.h0.requires_grad
        # Control examples last: what a block leaves on itself is theirs, which has a graph, so that its use is noticed.
        told = [
            stream.block(
                self.parts[i], forward, notes if whole else notes.take(stream.examples), self.leaves, needs_input
            )
            for stream in reversed(self.streams)
        ][::-1]
        noted = [each for _, each in told]
        stream = noted[0] if whole else tree_map(lambda *t: torch.cat(t), *noted)
        self.notes.append(replace(notes, stream=stream))
        return told[0][0]

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
        self.inner = [t for each in self.control for rows, own, _ in each.graphs for t in (rows, *own.values())]
        left = [stream.rows for stream in self.streams]
        value = left[0].detach()  # or this call would hold what holds it
        if len(left) > 1:
            value = value.new_empty(self.m, *value.shape[1:])
            for stream, rows in zip(self.streams, left, strict=True):
                value.index_copy_(0, self.order[stream.examples], rows.to(value.dtype))
        return Spliced.apply(self.h0, lambda: value, self._pull, *self.parameters.values())

    def _walk(self, delta: Tensor, notes: Sequence[BlockNotes], groups: int = 0) -> Iterator[Walked]:
        return walk(self.parts, notes, delta, self.leaves, self.how, self.first, self.h0.requires_grad, groups)

    def _pull(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Formula (1): from ``dL/dH``, the estimated gradients of ``h0`` and of the parameters."""
        gradients = Gradients(self.parameters, loud=self.how.loud or self.how.half == torch.float16)
        comparison, m = Comparison(), self.m
        walked: Iterator[Walked] | None = None
        if not self.whole:
            delta = delta.index_select(0, self.order)
            weights = control_weights(m, self.controls, delta.dtype, delta.device)
            walked = self._walk(delta * weights.view(m, 1, 1), self.notes)
            delta = m / self.controls * delta[: self.controls]
        arrived: list[Any] = [delta[stream.examples] for stream in self.control]
        compared: Iterator[Walked] | None = None
        if self.control[0].groups:
            notes = [block.take(self.control[0].examples) for block in self.notes]
            compared = self._walk(arrived[0], notes, self.control[0].groups)
        of_rows = None
        for _ in range(self.first, len(self.parts)):
            for k, stream in enumerate(self.control):
                arrived[k], own = stream.pull(arrived[k])
                if compared is not None and stream.groups:
                    own = self._compare(comparison, stream.groups, next(compared), own, arrived[k])
                if walked is not None and stream is self.control[-1]:
                    step = next(walked)
                    gradients.add(own, step.own)
                    of_rows = step.of_hidden
                else:
                    gradients.add_exact(own)
        if compared is not None:
            self.observed(comparison.spread())
        of_h0, of_parameters = gradients.totals(of_rows)
        if not self.h0.requires_grad:
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
