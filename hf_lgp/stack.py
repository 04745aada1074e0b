"""A model's stack of blocks: found, and run so that only some examples have a graph through it.

While :func:`spliced` is in effect each block has another ``forward``. The first starts a call: control examples go on with a graph, the others without, and what the walk will
need is noted. Between blocks the model carries a tensor that cannot be read; the last block hands it the values of all examples. Afterwards
the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .control.measurement import GroupSpread, GroupSums
from .control.plan import GROUPS, StepPlan, draw_order, identity_order, private_seed
from .estimator import control_size
from .rows.notes import BlockNotes, StreamNotes, joined, map_tensors
from .rows.parts import BlockParts, Intercept, UnknownBlock, attention_calls, find_parts, forward_replaced
from .rows.walk import first_row_of_block, noting, replayed_autocast, walk
from .sealed import FirstRow, Sealed, SpliceError
from .splice import Combine, Grouped, Predicted

Observed = Callable[[GroupSpread], None]


@dataclass(frozen=True)
class Stack:
    """Blocks that a model runs one after the other on rows of shape ``(m, T, D)``.

    Attributes:
        name: Where it stands in the model.
        parts: Its blocks.
        unbatched: Arguments of blocks that have no entry for each example although their first dimension may equal ``m``: by position or name.
        first_row_only: Whether the first row is all that the model reads of the last block's output.
    """

    name: str
    parts: tuple[BlockParts, ...]
    unbatched: frozenset[int | str] = frozenset()
    first_row_only: bool = False

    @property
    def trains(self) -> bool:
        """Whether anything in it is trained."""
        return any(p.requires_grad for part in self.parts for p in part.block.parameters())

    def predicted_parts(self, first_row: bool) -> tuple[BlockParts, ...]:
        """The blocks whose gradients are predicted: all, or all but the last where that is run on the first row."""
        return self.parts[:-1] if first_row and self.first_row_only else self.parts


def find_stacks(
    model: nn.Module, run: Callable[[], Any], fewer: Callable[[], Any] | None, intercept: Intercept
) -> tuple[Stack, ...]:
    """The stacks of blocks of a model.

    A stack is a list of modules of which each calls attention once.

    Args:
        model: The model.
        run: Runs it on a few examples; called twice, without gradients.
        fewer: Runs it on one example less; None if that is not possible.
        intercept: Gives a context in which attention goes to another function.

    Raises:
        UnknownBlock: If there is none, or if its attention cannot be followed.
    """
    with torch.no_grad():
        called = set(attention_calls(run, intercept))
    lists: list[tuple[str, list[nn.Module]]] = []
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not children:
            continue
        if all(sum(m in called for m in child.modules()) == 1 for child in children):
            lists.append((name, children))
    if not lists:
        raise UnknownBlock("it has no list of blocks each of which calls attention once")
    parts = find_parts([block for _, blocks in lists for block in blocks], run, intercept)
    unbatched = frozenset() if fewer is None else _unbatched(parts, run, fewer)
    stacks = []
    for name, blocks in lists:
        stacks.append(Stack(name, parts[: len(blocks)], unbatched))
        parts = parts[len(blocks) :]
    if not any(stack.trains for stack in stacks):
        raise UnknownBlock("nothing in its blocks is trained, so there is no gradient to predict")
    for stack in stacks:
        coupled = [m for p in stack.parts for m in p.block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if coupled:
            raise UnknownBlock("a BatchNorm in its blocks couples the examples of a batch")
    return tuple(stacks)


def _unbatched(parts: Sequence[BlockParts], run: Callable[[], Any], fewer: Callable[[], Any]) -> frozenset[int | str]:
    """Arguments whose first dimension stays the same with one example less."""
    seen: list[dict[int | str, list[int]]] = []

    def note(sizes: dict[int | str, list[int]], forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            for key, value in (*enumerate(args), *kwargs.items()):
                map_tensors(
                    lambda t, key=key: (
                        sizes.setdefault(key, []).append(len(t)) if isinstance(t, Tensor) and t.dim() else None
                    ),
                    value,
                )
            return forward(*args, **kwargs)

        return noted

    for runs in (run, fewer):
        seen.append({})
        with torch.no_grad(), forward_replaced(*((p.block, note(seen[-1], p.block.forward)) for p in parts)):
            runs()
    return frozenset(key for key, sizes in seen[0].items() if seen[1].get(key) == sizes)


class _Call:
    """One call of a stack: what a backward needs belongs to it, never to the module."""

    def __init__(
        self,
        stack: Stack,
        plan: StepPlan,
        groups: int,
        number: int,
        h0: Tensor,
        intercept: Intercept,
        observed: Observed,
    ) -> None:
        self.stack, self.plan, self.groups, self.intercept, self.observed = stack, plan, groups, intercept, observed
        self.first_row = plan.first_row and stack.first_row_only
        self.parts = stack.predicted_parts(plan.first_row)
        self.m, self.controls = len(h0), control_size(len(h0), plan.fraction)
        whole = self.controls == self.m
        self.order, self.inverse = (
            identity_order(self.m, h0.device)
            if whole
            else draw_order(self.m, private_seed(plan.seed, number), h0.device)
        )
        self.h0, self.sealed = h0, Sealed.of(h0)
        device = h0.device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ordered = h0 if whole else h0.index_select(0, self.order)
        self.control, self.others = ordered[: self.controls], ordered[self.controls :].detach()
        self.notes: list[BlockNotes] = []
        self.parameters = [p for part in self.parts for p in part.block.parameters() if p.requires_grad]
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}
        bounds = [round(g * self.controls / min(GROUPS, self.controls)) for g in range(min(GROUPS, self.controls) + 1)]
        self.slices = [slice(*b) for b in zip(bounds, bounds[1:])] if plan.measure else []
        self.leaves = [self.control[s].detach().requires_grad_(h0.requires_grad) for s in self.slices]
        self.streams = list(self.leaves) if plan.measure else [self.control]

    def _ordered(self, key: int | str, value: Any) -> Any:
        if key in self.stack.unbatched:
            return value

        def select(t: Any) -> Any:
            if not isinstance(t, Tensor) or t.dim() == 0 or len(t) != self.m:
                return t
            if id(t) not in self._selected:
                self._selected[id(t)] = (t if self.controls == self.m else t.index_select(0, self.order), t)
            return self._selected[id(t)][0]

        return map_tensors(select, value)

    def block(
        self, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Run all streams through block ``i``; what the block returned besides its rows."""
        args = tuple(self._ordered(key, value) for key, value in enumerate(args, start=1))
        kwargs = {key: self._ordered(key, value) for key, value in kwargs.items()}
        batched = frozenset(id(ordered) for ordered, _ in self._selected.values())
        entered = [s.detach() for s in self.streams] + ([self.others] if len(self.others) else [])
        notes = BlockNotes(
            torch.cat(entered) if len(entered) > 1 else entered[0], args, kwargs, batched, StreamNotes({}, {})
        )
        streams: list[StreamNotes] = []

        def run(stream: Tensor, part: slice, graph: bool) -> Tensor:
            nonlocal rest
            own = notes if part == slice(0, self.m) else notes.take(part)
            with noting(self.parts[i]) as noted, torch.set_grad_enabled(graph):
                out = forward(stream, *own.args, **own.kwargs)
            streams.append(noted())
            rest = out[1:] if isinstance(out, tuple) else None
            if rest is not None and any(item is not None for item in rest):
                raise SpliceError("its blocks return more than their rows")
            return out[0] if isinstance(out, tuple) else out

        rest: tuple[Any, ...] | None = None
        parts = self.slices if self.plan.measure else [slice(0, self.controls)]
        self.streams = [run(stream, part, True) for stream, part in zip(self.streams, parts, strict=True)]
        if len(self.others):
            self.others = run(self.others, slice(self.controls, self.m), False)
        self.notes.append(BlockNotes(notes.hidden, args, kwargs, batched, joined(streams)))
        return rest

    def finish(self) -> Tensor:
        """The stack's output for all examples, in their own order."""
        self._selected.clear()
        control = self.streams[0]
        if self.plan.measure:
            value = torch.cat([s.detach() for s in self.streams])
            control = Grouped.apply(self.control, value, self._pull_groups, *self.parameters)
        if self.plan.all_control or (self.controls == self.m):
            return control
        predicted = Predicted.apply(self.h0, self._predict, self.inverse, *self.parameters)
        return Combine.apply(control, predicted, self.others, self.order, self.inverse)

    def _walk(self, notes: Sequence[BlockNotes], delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        with replayed_autocast(*self.autocast):
            return walk(self.parts, notes, delta, self.parameters, self.groups, self.h0.requires_grad, self.intercept)

    def _predict(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        return self._walk(self.notes, delta)

    def _pull_groups(self, delta: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Exact gradients, group by group, each compared with its prediction."""
        sums, of_control, like = GroupSums(), [], self.parameters
        for leaf, out, part in zip(self.leaves, self.streams, self.slices, strict=True):
            wanted = [leaf, *like] if leaf.requires_grad else like
            exact = list(torch.autograd.grad(out, wanted, delta[part], allow_unused=True))
            of_rows, predicted = self._walk([notes.take(part) for notes in self.notes], delta[part])
            if leaf.requires_grad:
                of_control.append(exact[0])
                predicted, exact[0] = [of_rows.sum(0), *predicted], exact[0].sum(0)
            used = [k for k, g in enumerate(exact) if g is not None]
            zeros = [torch.zeros_like(exact[k]) if predicted[k] is None else predicted[k] for k in used]
            sums.add([exact[k] for k in used], zeros)
        self.observed(sums.spread())
        of_parameters: list[Tensor | None] = [None] * len(exact)
        for k, total in zip(used, sums.exact, strict=True):
            of_parameters[k] = total
        if of_control:
            return torch.cat(of_control), of_parameters[1:]
        return None, of_parameters


@contextmanager
def spliced(
    stacks: Sequence[Stack], plan: StepPlan, groups: int, intercept: Intercept, observed: Observed = lambda _: None
) -> Iterator[None]:
    """A context in which a model's stacks follow a plan.

    Args:
        stacks: The stacks.
        plan: The plan.
        groups: ``K``, mean rows of the walk.
        intercept: Gives a context in which attention goes to another function.
        observed: Is told what a measuring plan measured, for each call of a stack.

    Raises:
        SpliceError: In the model's forward, if it uses a stack in another way than one block after the other.
    """
    if plan.plain:
        yield
        return
    with ExitStack() as exits:
        calls = iter(range(10**9))
        for stack in stacks:
            runs = _Runs(
                stack,
                lambda stack, h0: _Call(stack, plan, groups, next(calls), h0, intercept, observed),
                plan,
                intercept,
            )
            exits.enter_context(
                forward_replaced(
                    *((p.block, partial(runs.block, i, p.block.forward)) for i, p in enumerate(stack.parts))
                )
            )
        yield


class _Runs:
    """Tells one call of a stack from the next."""

    def __init__(
        self, stack: Stack, begin: Callable[[Stack, Tensor], _Call], plan: StepPlan, intercept: Intercept
    ) -> None:
        self.stack, self.begin, self.plan, self.intercept = stack, begin, plan, intercept
        self.first_row = plan.first_row and stack.first_row_only
        self.predicted = len(stack.predicted_parts(plan.first_row)) if plan.splits else 0
        self.call: _Call | None = None

    def block(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        by_name = None if args else next((n for n in ("hidden_states", "x", "src") if n in kwargs), next(iter(kwargs)))
        hidden, args = (args[0], args[1:]) if by_name is None else (kwargs.pop(by_name), ())
        if not torch.is_grad_enabled():
            self._check(not isinstance(hidden, Sealed), "part of it is run without gradients")
            return forward(hidden, *args, **kwargs)
        if i < self.predicted:
            if i == 0:
                self._check(
                    isinstance(hidden, Tensor) and hidden.dim() == 3 and not isinstance(hidden, Sealed),
                    "its blocks do not take rows",
                )
                self.call = self.begin(self.stack, hidden)
            call = self.call
            self._check(
                call is not None and (i == 0 or hidden is call.sealed) and len(call.notes) == i,
                "its blocks do not run one after the other, each once",
            )
            rest = call.block(i, forward, args, kwargs)
            self.call = None if i + 1 == self.predicted else call
            out = call.sealed if self.call is not None else call.finish()
            return out if rest is None else (out, *rest)
        self._check(not isinstance(hidden, Sealed), "its blocks do not run one after the other, each once")
        if self.first_row and i == len(self.stack.parts) - 1:
            out = first_row_of_block(self.stack.parts[i], hidden, args, kwargs, self.intercept)
            row, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            self._check(rest is None or all(item is None for item in rest), "its blocks return more than their rows")
            return row.as_subclass(FirstRow) if rest is None else (row.as_subclass(FirstRow), *rest)
        return forward(hidden, *args, **kwargs)

    @staticmethod
    def _check(holds: bool, otherwise: str) -> None:
        if not holds:
            raise SpliceError(otherwise)
