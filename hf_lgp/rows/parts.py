"""The parts of a block that the walk must know: what its attention reads, which layers make keys and values, and its norms and dropouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class AttentionFunction(Protocol):
    """An attention function as models call it.

    ``query`` is ``(m, H, S, d)``, ``key`` and ``value`` ``(m, H, T, d)``; the result is ``(m, S, H, d)`` and, or None, attention weights. ``plain`` is the
    function that the model would have called.
    """

    def __call__(
        self,
        plain: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Any: ...


Intercept = Callable[[AttentionFunction], AbstractContextManager[None]]
"""A context in which a model's attention goes to another function."""


@dataclass(frozen=True)
class BlockParts:
    """A block and those of its modules that the walk treats by themselves.

    Attributes:
        block: The block.
        attention: The module whose first argument is ``x``, the rows that keys and values are made of.
        front: The norm between the block's input and ``x``; None where ``x`` is the block's input.
        key: The layer whose output, split into heads, is the keys; None if they are made in another way.
        value: The same for values; None along with ``key``.
        norms: Layer norms of the block, without ``front``.
        dropouts: Its dropouts.
    """

    block: nn.Module
    attention: nn.Module
    front: nn.Module | None
    key: nn.Linear | None
    value: nn.Linear | None
    norms: tuple[nn.LayerNorm, ...]
    dropouts: tuple[nn.Dropout, ...]


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


@dataclass(frozen=True)
class _Spot:
    """One call of attention: its module and the tensors it was given."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor


def attention_calls(run: Callable[[], Any], intercept: Intercept) -> list[nn.Module]:
    """Run a model and list the modules that called attention, in order."""
    called: list[nn.Module] = []

    def note(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return plain(module, *args, **kwargs)

    with intercept(note):
        run()
    return called


def find_parts(blocks: Sequence[nn.Module], run: Callable[[], Any], intercept: Intercept) -> tuple[BlockParts, ...]:
    """Learn the parts of blocks from one forward.

    Args:
        blocks: The blocks, each of which calls attention once.
        run: Runs the model; called once, without gradients.
        intercept: Gives a context in which attention goes to another function.

    Raises:
        UnknownBlock: If a block's attention reads something else than its input or a norm of it.
    """
    inside = {module for block in blocks for module in block.modules()}
    entered: dict[nn.Module, Any] = {}
    made: dict[nn.Module, Any] = {}
    spots: dict[nn.Module, _Spot] = {}

    def note(
        plain: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        spots.setdefault(module, _Spot(module, query, key, value))  # the first of several calls, as all here
        return plain(module, query, key, value, *args, **kwargs)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in inside:
            entered.setdefault(module, args[0] if args else kwargs.get("hidden_states"))

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if module in inside:
            made.setdefault(module, out)

    handles = [
        handle
        for module in inside
        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        )
    ]
    try:
        with torch.no_grad(), intercept(note):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_parts_of(block, spots, entered, made) for block in blocks)


def _parts_of(
    block: nn.Module, spots: dict[nn.Module, _Spot], entered: dict[nn.Module, Any], made: dict[nn.Module, Any]
) -> BlockParts:
    spot = next(spots[module] for module in block.modules() if module in spots)
    hidden, x = entered.get(block), entered.get(spot.module)
    if not isinstance(hidden, Tensor) or not isinstance(x, Tensor) or hidden.dim() != 3:
        raise UnknownBlock("its blocks do not take rows of shape (examples, rows, width)")
    front: nn.Module | None = None
    if x is not hidden:
        front = next((m for m in block.modules() if made.get(m) is x and entered.get(m) is hidden), None)
        if front is None:
            raise UnknownBlock("its attention reads something else than a block's input or a norm of it")
    if spot.query.shape[2] != x.shape[1] or spot.key.shape[2] != x.shape[1]:
        raise UnknownBlock("its attention does not have one query and one key for each row")
    key, value = (_layer_of(t, x, spot, entered, made) for t in (spot.key, spot.value))
    folds = key is not None and value is not None
    norms = tuple(m for m in block.modules() if isinstance(m, nn.LayerNorm) and m is not front)
    dropouts = tuple(m for m in block.modules() if isinstance(m, nn.Dropout))
    return BlockParts(block, spot.module, front, key if folds else None, value if folds else None, norms, dropouts)


def _layer_of(
    heads: Tensor, x: Tensor, spot: _Spot, entered: dict[nn.Module, Any], made: dict[nn.Module, Any]
) -> nn.Linear | None:
    """The linear layer whose output, split into as many heads as there are queries, these are; None if there is none."""
    m, count, t, d = heads.shape
    if count != spot.query.shape[1]:
        return None
    for module in spot.module.modules():
        out = made.get(module)
        if type(module) is nn.Linear and isinstance(out, Tensor) and entered.get(module) is x:
            view = out.shape == (m, t, count * d) and out.view(m, t, count, d).transpose(1, 2)
            if isinstance(view, Tensor) and view.data_ptr() == heads.data_ptr() and view.stride() == heads.stride():
                return module
    return None
