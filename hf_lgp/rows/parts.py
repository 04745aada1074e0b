"""The parts of a block that the walk must know: what its attention reads, what makes keys and values, and its norms and dropouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..sealed import SpliceError
from .norms import Norm, norm_of
from .projections import Projection, projection_of

AttentionFunction = Callable[
    [Callable[[], Any], Tensor, Tensor, Tensor, Sequence[Any], bool, float | None, float], tuple[Tensor, Any]
]
"""``(plain, query, key, value, masks, causal, scaling, dropout)``, ``plain()`` being what the model would have done: ``query`` is ``(m, H, S, d)``, ``key`` and
``value`` ``(m, H', T, d)``, each of ``masks`` broadcasts to ``(m, H, S, T)``, ``scaling`` is None for ``1 / sqrt(d)``; the result is ``(m, S, H, d)`` and, or None, attention weights."""

Intercept = Callable[[AttentionFunction], AbstractContextManager[None]]
"""A context in which a model's attention goes to another function."""


@dataclass(frozen=True)
class BlockParts:
    """A block and those of its modules that the walk treats by themselves."""

    block: nn.Module  # the block
    attention: nn.Module  # the module whose first argument is ``x``, the rows that keys and values are made of
    front: nn.Module | None  # the norm between the block's input and ``x``; None where ``x`` is the block's input
    behind: nn.Module | None  # the first module within it that is given what attention made
    key: Projection | None  # the affine map from ``x`` to keys; None if they are made in another way
    value: Projection | None  # the same for values
    on_few: bool  # whether the attention module is given the followed rows alone, not all
    early: tuple[nn.Dropout, ...]  # dropouts within it that run before attention
    before: tuple[nn.Dropout, ...]  # dropouts of the block that run before it
    norms: tuple[Norm, ...]  # norms of the block, without ``front``
    dropouts: tuple[nn.Dropout, ...]  # its dropouts


class UnknownBlock(ValueError):
    """A block whose attention cannot be followed on a few rows; the message says why."""


class NothingTrained(UnknownBlock):
    """There is no gradient to predict, for the time being."""


@contextmanager
def forward_replaced(*replacements: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which modules have other forwards; what they had is put back at its end."""
    with ExitStack() as stack:
        for module, forward in replacements:
            own = module.__dict__.get("forward")
            if own is None:
                stack.callback(module.__dict__.pop, "forward", None)
            else:
                stack.callback(module.__dict__.__setitem__, "forward", own)
            module.__dict__["forward"] = forward
        yield


@contextmanager
def module_by_module() -> Iterator[None]:
    """A context in which PyTorch's encoder layers call their modules even where no gradient is asked for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def refuse_reuse() -> None:
    """Raise :class:`SpliceError` where a forward is recomputed in a backward, which would draw other control examples, or finds weights that another stream made."""
    if parametrize._cache_enabled:
        raise SpliceError("its parametrized weights are cached, by `parametrize.cached`")
    if torch._C._current_graph_task_id() != -1:
        raise SpliceError("what is spliced is run once more in the backward, as by activation checkpointing around it")


def refuse_listeners(*blocks: nn.Module) -> None:
    """Raise :class:`SpliceError` where hooks in blocks would be told of some examples and rows only. Those of libraries, which are part of the model or listen only when asked to, may stay."""
    for module in (m for block in blocks for m in block.modules()):
        of_kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        for hook in (hook for hooks in of_kinds for hook in hooks.values()):
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in ("torch", "transformers"):
                raise SpliceError(
                    f"a hook in its blocks, of a {type(module).__name__}, would not be told of all examples"
                )


class Spot(NamedTuple):
    """One call of attention: its query, key and value, and the modules that were running, the innermost last."""

    query: Tensor
    key: Tensor
    value: Tensor
    running: tuple[nn.Module, ...]
    ran: frozenset[nn.Module]  # modules that had been called by then
    behind: list[nn.Module]  # modules that were called later, in their order


class Heard(NamedTuple):
    """What one forward of a model was heard to do in the first call of every module: calls of attention, by the innermost module, and what it was given and returned."""

    spots: dict[nn.Module, list[Spot]]
    entered: dict[nn.Module, Any]  # first arguments
    made: dict[nn.Module, Any]  # what was returned


def heard(model: nn.Module, run: Callable[[], Any], intercept: Intercept) -> Heard:
    """Run a model and listen."""
    found, running, latest = Heard({}, {}, {}), list[nn.Module](), list[Spot]()

    def note(plain: Callable[[], Any], query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
        out = plain()
        if running and running[-1] not in found.made:
            latest[:] = [Spot(query, key, value, tuple(running), frozenset(found.entered), [])]
            found.spots.setdefault(running[-1], []).extend(latest)
        return out

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.entered.setdefault(module, args[0] if args else next(iter(kwargs.values()), None))
        if latest:
            latest[0].behind.append(module)
        running.append(module)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        found.made.setdefault(module, out)
        running.pop()

    with ExitStack() as exits, module_by_module(), intercept(note):
        for module in model.modules():
            exits.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            exits.callback(module.register_forward_hook(after).remove)
        run()
    return found


def parts_of(block: nn.Module, found: Heard) -> BlockParts:
    """The parts of a block that calls attention once.

    Raises:
        UnknownBlock: If its attention reads something else than its input or a norm of it.
    """
    (spot,) = (spot for module in block.modules() for spot in found.spots.get(module, ()))
    hidden = found.entered.get(block)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnknownBlock("its blocks do not take rows of shape (examples, rows, width)")
    attention, front = _attention_of(block, hidden, spot, found)
    x = found.entered[attention]
    if any(t.dim() != 4 or (len(t), t.shape[2]) != x.shape[:2] for t in (spot.query, spot.key, spot.value)):
        raise UnknownBlock("its attention does not have one query and one key for each row")
    within = set(attention.modules())
    behind = next((m for m in spot.behind if m in within and found.entered[m] is not x), None)
    key, value = (projection_of(t, x, attention, found.entered, found.made) for t in (spot.key, spot.value))
    norms = (norm_of(m, found.entered.get(m)) for m in block.modules() if m is not front)
    dropouts = tuple(m for m in block.modules() if isinstance(m, nn.Dropout))
    on_few = all(p is not None and p.module is not attention for p in (key, value))
    known = tuple(norm for norm in norms if norm is not None)
    ran = [d for d in dropouts if d in spot.ran]
    early, before = (tuple(d for d in ran if (d in within) is inside) for inside in (True, False))
    return BlockParts(block, attention, front, behind, key, value, on_few, early, before, known, dropouts)


def _attention_of(block: nn.Module, hidden: Tensor, spot: Spot, found: Heard) -> tuple[nn.Module, nn.Module | None]:
    """The innermost module around a call of attention that is given a block's input or a norm of it, and that norm."""
    within = spot.running[spot.running.index(block) + 1 :] if block in spot.running else ()
    for module in reversed(within):
        x = found.entered[module]
        if x is hidden:
            return module, None
        fronts = (m for m in block.modules() if found.made.get(m) is x and found.entered.get(m) is hidden)
        if isinstance(x, Tensor) and (front := next(fronts, None)) is not None:
            return module, front
    raise UnknownBlock("its attention reads something else than a block's input or a norm of it")
