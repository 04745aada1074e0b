"""Batches of any kind, nested as they like: their tensors, their size, and copies of their first examples."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def few_of(inputs: Any, count: int) -> Any:
    """Copies of the first examples of a batch: of every tensor whose first dimension is that of the first tensor found."""
    examples = examples_of(inputs)

    def few(value: Any) -> Any:
        if isinstance(value, Tensor):
            part = count < examples and value.dim() and len(value) == examples
            return (value[:count] if part else value).clone()
        if isinstance(value, Mapping):
            items = {name: few(item) for name, item in value.items()}
            if isinstance(value, dict | UserDict):  # with whatever else it holds
                value = copy.copy(value)
                value.update(items)
                return value
            try:
                return type(value)(items)  # type: ignore[call-arg]
            except TypeError:
                return items
        if type(value) in (list, tuple):
            return type(value)(few(item) for item in value)
        return value

    return few(inputs)


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    """The tensors of a batch."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (Mapping, list, tuple)):
        for item in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from tensors_of(item)


def versions_of(inputs: Any) -> list[tuple[Tensor, int | None]]:
    """The tensors of a batch, and what tells whether they have been changed in place since; None for those of which nothing tells."""
    return [(t, None if t.is_inference() else t._version) for t in tensors_of(inputs)]


def changed(before: list[tuple[Tensor, int | None]], inputs: Any) -> bool:
    """Whether a batch holds other tensors than it did, or others' values, given its :func:`versions_of` then."""
    now = versions_of(inputs)
    return len(now) != len(before) or any(a is not b or v != w for (a, v), (b, w) in zip(before, now, strict=True))


def examples_of(inputs: Any) -> int:
    """Number of examples of a batch: the first dimension of its first tensor; 0 if there is none."""
    return next((len(t) for t in tensors_of(inputs) if t.dim()), 0)


def entries_of(inputs: Any) -> int:
    """Entries of a batch's largest tensor: the unit of work in which times of micro-batches are compared."""
    return max((t.numel() for t in tensors_of(inputs)), default=1)
