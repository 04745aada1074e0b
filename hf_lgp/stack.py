"""A model's stack of blocks: found, and run so that only some examples have a graph through it.

While :func:`spliced` is in effect each block has another ``forward``. The first starts a call: control examples go on with a graph, the others without, and what the walk will
need is noted. Between blocks the model carries a tensor that cannot be read; the last block hands it the values of all examples. Afterwards
the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .call import Call, Observed
from .control.plan import StepPlan
from .rows.block import first_row_of_block
from .rows.parts import (
    BlockParts,
    Intercept,
    NothingTrained,
    UnknownBlock,
    forward_replaced,
    heard,
    module_by_module,
    parts_of,
    refuse_listeners,
    refuse_reuse,
)
from .rows.walk import HowToWalk
from .sealed import FirstRow, Sealed, SpliceError


@dataclass(frozen=True)
class Stack:
    """Blocks that a model runs one after the other on rows of shape ``(m, T, D)``.

    Attributes:
        parts: Its blocks.
        unbatched: Arguments of blocks that have no entry for each example although their first dimension may equal ``m``: by position or name.
        first_row_only: Whether the first row is all that the model reads of the last block's output.
    """

    parts: tuple[BlockParts, ...]
    unbatched: frozenset[int | str] = frozenset()
    first_row_only: bool = False

    def predicted_parts(self, first_row: bool) -> tuple[BlockParts, ...]:
        """The blocks whose gradients are predicted: all, or all but the last where that is run on the first row."""
        return self.parts[:-1] if first_row and self.first_row_only else self.parts


def find_stacks(
    model: nn.Module, run: Callable[[], Any], fewer: Callable[[], Any] | None, intercept: Intercept
) -> tuple[Stack, ...]:
    """The stacks of blocks of a model.

    A stack is a list of modules of which each calls attention once.

    Raises:
        UnknownBlock: If there is none, or if its attention cannot be followed.
        NothingTrained: If no block has a parameter that is trained.
    """
    found = heard(model, run, intercept)
    if any(getattr(out, "attentions", None) is not None for out in found.made.values()):
        raise UnknownBlock(
            "it returns attention weights, which not all examples and rows have: leave `output_attentions` off"
        )
    if not found.spots:
        raise UnknownBlock(
            "it calls attention neither by transformers' interface nor by `F.scaled_dot_product_attention`"
        )
    parts: list[tuple[BlockParts, ...]] = []
    within: set[nn.Module] = set()  # what stands in a list that was taken already
    reasons: list[UnknownBlock] = []
    for module in model.modules():
        blocks = list(module.children())
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not blocks or module in within:
            continue
        if any(sum(len(found.spots.get(m, ())) for m in block.modules()) != 1 for block in blocks):
            continue
        try:
            parts.append(tuple(parts_of(block, found) for block in blocks))
            within.update(m for block in blocks for m in block.modules())
        except UnknownBlock as reason:
            reasons.append(reason)
    if not parts:
        raise next(iter(reasons), UnknownBlock("it has no list of blocks each of which calls attention once"))
    unbatched = frozenset() if fewer is None else _unbatched([p for each in parts for p in each], run, fewer)
    trained = (each for each in parts if any(p.requires_grad for part in each for p in part.block.parameters()))
    stacks = [Stack(each, unbatched) for each in trained]
    if not stacks:
        raise NothingTrained("nothing in its blocks is trained, so there is no gradient to predict")
    coupled = nn.modules.batchnorm._BatchNorm
    free = [s for s in stacks if not any(isinstance(m, coupled) for part in s.parts for m in part.block.modules())]
    if not free:
        raise UnknownBlock("a BatchNorm in its blocks couples the examples of a batch")
    return tuple(free)


def _unbatched(parts: Sequence[BlockParts], run: Callable[[], Any], fewer: Callable[[], Any]) -> frozenset[int | str]:
    """Arguments whose first dimension stays the same with fewer examples.

    None are known where the loss wants all examples; what is then wrongly taken for a batch gives the split model another loss in the check.
    """
    seen: list[dict[int | str, list[int]]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        for key, value in (*enumerate(args), *kwargs.items()):
            seen[-1].setdefault(key, []).extend(len(t) for t in tree_leaves(value) if isinstance(t, Tensor) and t.dim())

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.block.register_forward_pre_hook(note, with_kwargs=True).remove)
        for each, may_fail in ((run, ()), (fewer, (Exception,))):
            seen.append({})
            with suppress(*may_fail):
                each()
    # One entry may stand for all examples of this batch, and another batch have one for each.
    return frozenset(key for key, sizes in seen[0].items() if seen[1].get(key) == sizes and set(sizes) - {1})


@contextmanager
def spliced(
    stacks: Sequence[Stack], plan: StepPlan, how: HowToWalk, observed: Observed = lambda _: None
) -> Iterator[None]:
    """A context in which a model's stacks follow a plan.

    Raises:
        SpliceError: In the model's forward, if it uses a stack in another way than one block after the other, or if somebody listens in it; at the end, if a
            gradient arrived where the loss may have taken something out of a block.
    """
    if plan.plain:
        yield
        return
    numbers = count()
    runs = [_Runs(stack, plan, numbers, how, observed) for stack in stacks]
    replaced = [
        (part.block, partial(each.block, i, part.block.forward))
        for each in runs
        for i, part in enumerate(each.stack.parts)
    ]
    with module_by_module(), forward_replaced(*replaced):
        yield
    if any(t.grad is not None for each in runs for t in each.inner):
        error = SpliceError("its loss reads something from inside its blocks")
        error.in_backward = True
        raise error


class _Runs:
    """The forwards that a stack's blocks have for the time of a step; it tells one call of the stack from the next."""

    def __init__(
        self, stack: Stack, plan: StepPlan, numbers: Iterator[int], how: HowToWalk, observed: Observed
    ) -> None:
        self.stack, self.how = stack, how
        self.first_row = plan.first_row and stack.first_row_only
        self.predicted = stack.predicted_parts(plan.first_row) if plan.splits else ()
        self.rest = how, observed
        self.plan, self.numbers = plan, numbers
        self.call: Call | None = None
        self.inner: list[Tensor] = []  # kept, as nothing else may be left of what the loss read

    def block(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:  # by name: the first, whatever that is
            hidden = kwargs.pop(next(iter(kwargs)))
        if i == 0:
            self.call = None
            if torch.is_grad_enabled():
                refuse_listeners(*(part.block for part in self.stack.parts))
        if not torch.is_grad_enabled() or (i >= len(self.predicted) and not isinstance(hidden, Sealed)):
            if torch.is_grad_enabled() and self.first_row and i == len(self.stack.parts) - 1:
                return self._first_row(hidden, args, kwargs)
            return forward(hidden, *args, **kwargs)
        if i == 0:
            refuse_reuse()
        if i == 0 and isinstance(hidden, Tensor) and hidden.dim() == 3 and not isinstance(hidden, Sealed):
            self.call = Call(self.predicted, self.stack.unbatched, self.plan, next(self.numbers), hidden, *self.rest)
        call = self.call
        if call is None or len(call.notes) != i or (i > 0 and hidden is not call.sealed):
            raise SpliceError("its blocks do not run one after the other, each once")
        rest = call.block(forward, args, kwargs)
        out: Tensor = call.sealed
        if i + 1 == len(self.predicted):
            out, self.call = call.finish(), None
            self.inner += call.inner
        return out if rest is None else (out, *rest)

    def _first_row(self, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = first_row_of_block(self.stack.parts[-1], hidden, args, kwargs, self.how.intercept)
        if not isinstance(out, tuple):
            return out.as_subclass(FirstRow)
        if any(item is not None for item in out[1:]):
            raise SpliceError("its blocks return more than their rows")
        return (out[0].as_subclass(FirstRow), *out[1:])
