"""One call of a stack: control examples with a graph, the others without, notes for the walk, and formula (1) as the backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .control.measurement import GroupSpread, GroupSums
from .control.plan import StepPlan, draw_order, identity_order, private_seed
from .estimator import control_size
from .rows.block import noting
from .rows.notes import BlockNotes, StreamNotes, joined, map_tensors
from .rows.parts import BlockParts, Intercept
from .rows.walk import RowBudget, walk
from .sealed import Sealed, SpliceError
from .splice import Combine, Grouped, Predicted

Observed = Callable[[GroupSpread], None]
"""Is told what a measuring call measured."""


@dataclass(frozen=True)
class HowToWalk:
    """What the walk needs besides the notes."""

    budget: RowBudget
    intercept: Intercept  # gives a context in which attention goes to another function


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
        ordered = h0 if self.whole else h0.index_select(0, self.order)
        self.control, self.others = ordered[: self.controls], ordered[self.controls :].detach()
        groups = min(plan.measure, self.controls) if plan.measure else 1
        self.slices = [slice(*b) for b in pairwise(round(g * self.controls / groups) for g in range(groups + 1))]
        self.measured = plan.measure > 0
        # Groups that are compared have graphs of their own.
        self.leaves = [self.control[s].detach().requires_grad_(h0.requires_grad) for s in self.slices]
        self.streams = list(self.leaves) if plan.measure else [self.control]
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
        entered = [s.detach() for s in self.streams] + ([] if self.whole else [self.others])
        hidden = torch.cat(entered) if len(entered) > 1 else entered[0]
        notes = BlockNotes(hidden, args, kwargs, batched, StreamNotes({}, {}))
        noted: list[StreamNotes] = []
        rests: list[tuple[Any, ...] | None] = []

        def run(stream: Tensor, examples: slice, graph: bool) -> Tensor:
            own = notes if len(stream) == self.m else notes.take(examples)
            with noting(part) as tell, torch.set_grad_enabled(graph):
                out = forward(stream, *own.args, **own.kwargs)
            noted.append(tell())
            rests.append(out[1:] if isinstance(out, tuple) else None)
            if any(item is not None for item in rests[-1] or ()):
                raise SpliceError("its blocks return more than their rows")
            out = out[0] if isinstance(out, tuple) else out
            if out is stream:
                raise SpliceError("its blocks are left out at random")
            return out

        self.streams = [run(*each, graph=True) for each in zip(self.streams, self.slices, strict=True)]
        if not self.whole:
            self.others = run(self.others, slice(self.controls, self.m), graph=False)
        self.notes.append(BlockNotes(hidden, args, kwargs, batched, joined(noted)))
        return rests[0]

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
        control = self.streams[0]
        if self.measured:
            value = torch.cat([s.detach() for s in self.streams])
            control = Grouped.apply(self.control, value, self._pull_groups, *self.parameters)
        if self.whole:
            return control
        predicted = Predicted.apply(self.h0, self._predict, self.inverse, *self.parameters)
        return Combine.apply(control, predicted, self.others, self.order, self.inverse)

    def _walk(self, notes: Sequence[BlockNotes], delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        needs_input, how = self.h0.requires_grad, self.how
        device, dtype, enabled = self.autocast  # the forward's: a backward runs outside it
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return walk(self.parts, notes, delta, self.parameters, how.budget, needs_input, how.intercept)

    def _predict(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        return self._walk(self.notes, delta)

    def _pull_groups(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Exact gradients, group by group, each compared with its prediction; ``h0``'s counts as one more tensor."""
        sums, pieces = GroupSums(), []
        for leaf, out, part in zip(self.leaves, self.streams, self.slices, strict=True):
            wanted = [leaf] * leaf.requires_grad + self.parameters
            exact = list(torch.autograd.grad(out, wanted, delta[part], allow_unused=True))
            of_rows, predicted = self._walk([notes.take(part) for notes in self.notes], delta[part])
            if of_rows is not None and exact[0] is not None:
                pieces.append(exact[0])
                predicted, exact[0] = [of_rows.sum(0), *predicted], exact[0].sum(0)
            known = [
                (g, torch.zeros_like(g) if p is None else p)
                for g, p in zip(exact, predicted, strict=True)
                if g is not None
            ]
            sums.add([g for g, _ in known], [p for _, p in known])
        self.observed(sums.spread())
        totals = iter(sums.exact)
        gradients: list[Tensor | None] = [None if g is None else next(totals) for g in exact]
        return (torch.cat(pieces), gradients[1:]) if pieces else (None, gradients)
