"""The parts of a block that the walk must know: what its attention reads, which layers make keys and values, and its norms and dropouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

AttentionFunction = Callable[..., Any]
"""``(plain, module, query, key, value, mask, **options)``, ``plain`` being what the model would have called with the rest: ``query`` is ``(m, H, S, d)``, ``key`` and
``value`` ``(m, H, T, d)``; the result is ``(m, S, H, d)`` and, or None, attention weights."""

Intercept = Callable[[AttentionFunction], AbstractContextManager[None]]
"""A context in which a model's attention goes to another function."""


@dataclass(frozen=True)
class BlockParts:
    """A block and those of its modules that the walk treats by themselves."""

    block: nn.Module  # the block
    attention: nn.Module  # the module whose first argument is ``x``, the rows that keys and values are made of
    front: nn.Module | None  # the norm between the block's input and ``x``; None where ``x`` is the block's input
    key: nn.Linear | None  # the layer whose output, split into heads, is the keys; None if they are made in another way
    value: nn.Linear | None  # the same for values; None along with ``key``
    norms: tuple[nn.LayerNorm, ...]  # layer norms of the block, without ``front``
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


class Heard(NamedTuple):
    """What one forward of a model was heard to do: the first call of every module."""

    spots: dict[nn.Module, tuple[Tensor, Tensor, Tensor]]  # query, key and value, by the module that called attention
    entered: dict[nn.Module, Any]  # first arguments
    made: dict[nn.Module, Any]  # what was returned


def heard(model: nn.Module, run: Callable[[], Any], intercept: Intercept) -> Heard:
    """Run a model and listen."""
    found = Heard({}, {}, {})

    def note(
        plain: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        found.spots.setdefault(module, (query, key, value))
        return plain(module, query, key, value, *args, **kwargs)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.entered.setdefault(module, args[0] if args else next(iter(kwargs.values()), None))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        found.made.setdefault(module, out)

    with ExitStack() as exits, intercept(note):
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
    attention = next(module for module in block.modules() if module in found.spots)
    query, *spot = found.spots[attention]
    hidden, x = found.entered.get(block), found.entered.get(attention)
    if not isinstance(hidden, Tensor) or not isinstance(x, Tensor) or hidden.dim() != 3:
        raise UnknownBlock("its blocks do not take rows of shape (examples, rows, width)")
    front: nn.Module | None = None
    if x is not hidden:
        between = (m for m in block.modules() if found.made.get(m) is x and found.entered.get(m) is hidden)
        if (front := next(between, None)) is None:
            raise UnknownBlock("its attention reads something else than a block's input or a norm of it")
    if any(t.shape[2] != x.shape[1] for t in (query, *spot)):
        raise UnknownBlock("its attention does not have one query and one key for each row")
    key, value = (_layer_of(t, query, x, attention, found) for t in spot)
    folds = key is not None and value is not None
    norms = tuple(m for m in block.modules() if isinstance(m, nn.LayerNorm) and m is not front)
    dropouts = tuple(m for m in block.modules() if isinstance(m, nn.Dropout))
    return BlockParts(block, attention, front, key if folds else None, value if folds else None, norms, dropouts)


def _layer_of(heads: Tensor, query: Tensor, x: Tensor, attention: nn.Module, found: Heard) -> nn.Linear | None:
    """The linear layer whose output, split into as many heads as there are queries, these are; None if there is none."""
    m, count, t, d = heads.shape
    for module in attention.modules() if count == query.shape[1] else ():
        out: Any = found.made.get(module)
        if type(module) is nn.Linear and found.entered.get(module) is x and out.shape == (m, t, count * d):
            view = out.view(m, t, count, d).transpose(1, 2)
            if view.data_ptr() == heads.data_ptr() and view.stride() == heads.stride():
                return module
    return None
