"""One call of a stack: control examples with a graph, the others without, notes for the walk, and formula (1) as the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .control.measurement import GroupSpread
from .control.plan import StepPlan, draw_order, identity_order, private_seed
from .estimator import control_size
from .rows.notes import BlockNotes, StreamNotes, joined, map_tensors
from .rows.parts import BlockParts, Intercept
from .rows.walk import Compared, RowBudget, Walked, summed, walk
from .sealed import Sealed
from .splice import Combine, Enter, Predicted
from .streams import ComparedStream, Stream

Observed = Callable[[GroupSpread], None]
"""Is told what a measuring call measured."""


@dataclass(frozen=True)
class HowToWalk:
    """What the walk needs besides the notes."""

    budget: RowBudget
    intercept: Intercept  # gives a context in which attention goes to another function
    vectorized: bool = True  # whether ``torch.vmap`` runs the blocks on groups of examples


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
        self.parts, self.unbatched, self.how, self.observed = parts, unbatched, how, observed
        self.m, self.controls = len(h0), control_size(len(h0), plan.fraction)
        self.whole = self.controls == self.m
        seed, device = private_seed(plan.seed, number), h0.device
        self.order, self.inverse = identity_order(self.m, device) if self.whole else draw_order(self.m, seed, device)
        kind = device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.h0, self.sealed = h0, Sealed.of(h0)
        self.parameters = [p for part in parts for p in part.block.parameters() if p.requires_grad]
        self.control, self.stand_in = h0, h0
        if not self.whole:
            self.control, self.stand_in = Enter.apply(h0, self.order, self.inverse, self.controls)
        groups = min(plan.measure, self.controls)
        compared = self.controls // groups * groups if groups else 0
        parts_of_control = [slice(0, compared), slice(compared, self.controls)]
        self.streams: list[Stream] = []
        for part in parts_of_control:
            if part.start < part.stop:
                rows = self._of_control(part)
                own = ComparedStream(part, rows, groups, how.vectorized) if part.stop == compared else None
                self.streams.append(own or Stream(part, rows, graph=True))
        if not self.whole:
            part = slice(self.controls, self.m)
            self.streams.append(Stream(part, h0.detach().index_select(0, self.order[part]), graph=False))
        self.notes: list[BlockNotes] = []
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
        entered = [stream.rows.detach() for stream in self.streams]
        hidden = torch.cat(entered) if len(entered) > 1 else entered[0]
        notes = BlockNotes(hidden, args, kwargs, batched, StreamNotes({}, {}))
        told = [s.block(part, forward, notes if len(entered) == 1 else notes.take(s.examples)) for s in self.streams]
        self.notes.append(replace(notes, stream=joined([noted for _, noted in told])))
        return told[0][0]

    def _ordered(self, key: int | str, value: Any) -> Any:
        """An argument of a block with its examples in the call's order."""

        def select(t: Any) -> Any:
            if not isinstance(t, Tensor) or t.dim() == 0 or len(t) != self.m:
                return t
            if id(t) not in self._selected:
                self._selected[id(t)] = (t if self.whole else t.index_select(0, self.order), t)
            return self._selected[id(t)][0]

        return value if key in self.unbatched else map_tensors(select, value)

    def finish(self) -> Tensor:
        """The stack's output for all examples, in their own order, shape ``(m, T, D)``."""
        self._selected.clear()
        control = [self._value(stream) for stream in self.streams if stream.examples.stop <= self.controls]
        value = control[0] if len(control) == 1 else torch.cat(control)
        if self.whole:
            return value
        predicted = Predicted.apply(self.stand_in, self._predict, *self.parameters)
        return Combine.apply(value, predicted, self.streams[-1].rows, self.order)

    def _value(self, stream: Stream) -> Tensor:
        if not isinstance(stream, ComparedStream):
            return stream.rows
        walked = partial(self._walked, [block.take(stream.examples) for block in self.notes])
        entered = self._of_control(stream.examples)
        return stream.joined(entered, self.parts, self.parameters, walked, self.observed)

    def _of_control(self, part: slice) -> Tensor:
        return self.control if part == slice(0, self.controls) else self.control[part]

    def _walked(self, notes: Sequence[BlockNotes], delta: Tensor, compared: Compared | None = None) -> Iterator[Walked]:
        needs_input, how = self.h0.requires_grad, self.how
        device, dtype, enabled = self.autocast  # the forward's: a backward runs outside it
        steps = walk(self.parts, notes, delta, self.parameters, how.budget, needs_input, how.intercept, compared)
        while True:
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _predict(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        return summed(self._walked(self.notes, delta), self.parts, self.parameters)
