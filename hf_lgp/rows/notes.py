"""What one forward of a stack of blocks leaves for the walk: immutable records of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class StreamNotes(NamedTuple):
    """What a block noted of the examples it was run on.

    Attributes:
        scales: ``1 / sigma`` of every row, shape ``(m, T, 1)``, for each call of each layer norm, by its number in the block.
        kept: What dropout left of the first row, shape ``(m, 1, D)``: 0 or ``1 / (1 - p)``, for each call of each dropout, by its number.
    """

    scales: Mapping[int, tuple[Tensor, ...]]
    kept: Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class BlockNotes:
    """What is known of one block's forward on ``m`` examples."""

    hidden: Tensor  # rows that entered, shape ``(m, T, D)``, without a graph
    args: tuple[Any, ...]  # the block's other arguments; batched tensors are in the order of ``hidden``
    kwargs: Mapping[str, Any]  # the same for those given by name
    batched: frozenset[int]  # the tensors among them that have an entry for each example, by identity
    stream: StreamNotes  # what the block noted

    def each(self, function: Callable[[Tensor], Tensor], unbatched: bool = False) -> BlockNotes:
        """The same with another tensor for each that has an entry for each example, or for all."""
        batched: set[int] = set()

        def of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in self.batched:
                value = function(value)
                batched.add(id(value))
                return value
            return function(value) if unbatched else value

        hidden, args, kwargs = function(self.hidden), map_tensors(of, self.args), map_tensors(of, dict(self.kwargs))
        return BlockNotes(hidden, args, kwargs, frozenset(batched), tree_map(function, self.stream))

    def take(self, part: slice) -> BlockNotes:
        """The notes of some examples."""
        return self.each(lambda t: t[part])

    def met_by(self, followed: Tensor) -> BlockNotes:
        """The same with what dropout left of the first row only for examples of which it is the first that is followed: by index, shape ``(m, 1, 1)``."""
        if not self.stream.kept:
            return self
        kept = {k: tuple(torch.where(followed == 0, t, 1.0) for t in noted) for k, noted in self.stream.kept.items()}
        return replace(self, stream=self.stream._replace(kept=kept))

    def tensors(self, unbatched: bool = False) -> list[Tensor]:
        """All tensors that have an entry for each example, or all."""
        found: list[Tensor] = []

        def keep(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.each(keep, unbatched)
        return found

    def of(self, tensors: Sequence[Tensor], unbatched: bool = False) -> BlockNotes:
        """The same with other tensors, in the order of :meth:`tensors`."""
        remaining = iter(tensors)
        return self.each(lambda _: next(remaining), unbatched)

    def fixed(self, *more: Any) -> str | None:
        """What is known besides tensors, as a text; None if that cannot be told apart from something else by its text."""
        leaves = ["" if isinstance(t, Tensor) else t for t in tree_leaves((self.args, dict(self.kwargs)))]
        counts = [(k, len(t)) for noted in self.stream for k, t in noted.items()]
        simple = all(isinstance(value, (bool, int, float, str, type(None))) for value in leaves)
        return repr((more, leaves, list(self.kwargs), counts)) if simple else None


def map_tensors(function: Any, value: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists and dicts; other containers are leaves."""
    if type(value) is tuple or type(value) is list:
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {name: map_tensors(function, item) for name, item in value.items()}
    return function(value)
