"""The arguments of one call of a module, taken apart by examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..rows.notes import map_tensors
from ..sealed import SpliceError

_UNBATCHED = frozenset({"cache_position", "head_mask"})
"""Arguments that have no entry for each example, although their first dimension may equal ``m``."""


class Arguments:
    """Arguments in a new order of the examples. Every tensor whose first dimension is ``m`` has an entry for each example.

    Args:
        args: By position.
        kwargs: By name.

    Attributes:
        m: Examples: the first dimension of the first tensor.
        traced: Tensors that ask for a gradient, each with whether it has an entry for each example.

    Raises:
        SpliceError: If there is no tensor among them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, dict(kwargs)
        sizes: list[int] = []
        map_tensors(lambda t: sizes.append(len(t)) if isinstance(t, Tensor) and t.dim() else None, (args, self._kwargs))
        if not sizes:
            raise SpliceError("its trunk is called without a tensor")
        self.m = sizes[0]
        self.traced: list[tuple[Tensor, bool]] = []

    def reorder(self, order: Tensor | None) -> None:
        """Put the examples into their order, once; None leaves them as they are."""

        def ordered(t: Any) -> Any:
            batched = self._is_batched(t)
            if batched and order is not None:
                t = t.index_select(0, order)
            if isinstance(t, Tensor) and t.requires_grad:
                self.traced.append((t, batched))
            return t

        self._args, self._kwargs = self._mapped(ordered)

    def rows(self, part: slice) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]:
        """The arguments of some examples, cut off from the graph.

        Returns:
            Arguments by position and by name, and leaves that stand for :attr:`traced` among them: they ask for a gradient where gradients are recorded.
        """
        leaves: list[Tensor] = []

        def take(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            rows = (t[part] if self._is_batched(t) else t).detach()
            if t.requires_grad:
                leaves.append(rows.requires_grad_(torch.is_grad_enabled()))
            return rows

        args, kwargs = self._mapped(take)
        return args, kwargs, tuple(leaves)

    def _mapped(self, function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = map_tensors(function, self._args)
        return args, {k: v if k in _UNBATCHED else map_tensors(function, v) for k, v in self._kwargs.items()}

    def _is_batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.m
