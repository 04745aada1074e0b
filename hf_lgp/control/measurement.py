"""Measuring how well gradients are predicted: exact and predicted gradients of a few groups of examples, compared tensor by tensor.

The spread of the group sums of ``g - g~`` and of ``g`` gives ``sigma_e^2`` and ``sigma^2`` of every tensor, of any kind, without per-example
gradients; only their ratio matters, so the groups' size cancels.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimator import spread


@dataclass(frozen=True)
class GroupSpread:
    """Spreads of the group sums of one measurement, float32, on the device."""

    residual: Tensor  # ``sigma_e^2`` of each tensor, times a constant, shape ``(n,)``
    total: Tensor  # ``sigma^2`` of each, times the same, shape ``(n,)``


class Comparison:
    """Exact and predicted gradients of groups of examples, compared block by block."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._spreads: list[GroupSpread] = []

    def add(
        self, exact: Mapping[int, Tensor | None], predicted: Mapping[int, Tensor | None], later: Container[int]
    ) -> dict[int, Tensor]:
        """Compare gradients of shape ``(G, ...)``, by key, those aside that come again ``later``: blocks may share parameters.

        Returns:
            The sums of exact gradients over groups.
        """
        sums: dict[int, Tensor] = {}
        by_type: dict[torch.dtype, dict[int, tuple[Tensor, Tensor]]] = {}
        for key, g in exact.items():
            if g is None:
                continue
            p = predicted.get(key)
            pair = g, torch.zeros_like(g) if p is None else p
            if key in later or key in self._pending:
                sums[key] = g.sum(0)
                before = self._pending.pop(key, None)
                pair = pair if before is None else (before[0] + pair[0], before[1] + pair[1])
            if key in later:
                self._pending[key] = pair
            else:
                by_type.setdefault(g.dtype, {})[key] = pair
        for pairs in by_type.values():
            of_groups, spread = _compared(*zip(*pairs.values(), strict=True))
            self._spreads.append(spread)
            sums = {**dict(zip(pairs, of_groups, strict=True)), **sums}
        return sums

    def spread(self) -> GroupSpread:
        """The spreads of all that was compared."""
        residual, total = ([getattr(each, name) for each in self._spreads] for name in ("residual", "total"))
        return GroupSpread(torch.cat(residual), torch.cat(total))


def _compared(exact: Sequence[Tensor], predicted: Sequence[Tensor]) -> tuple[list[Tensor], GroupSpread]:
    """The sums over groups of exact gradients ``(G, ...)`` of one dtype, and the spreads."""
    residual = torch._foreach_sub(list(exact), list(predicted))
    sums = [[t.sum(0) for t in tensors] for tensors in (residual, exact)]
    spreads = [
        spread(_squared_norms(of_sums), _squared_norms(tensors), len(exact[0]))
        for of_sums, tensors in zip(sums, (residual, exact), strict=True)
    ]
    return sums[1], GroupSpread(*spreads)


class GroupSums:
    """Running sums over groups; what :class:`GroupSpread` is made of."""

    def __init__(self) -> None:
        self._sums: list[Sequence[Tensor]] = []  # of residuals and of exact gradients, tensor by tensor
        self._squares: list[Tensor] = []
        self._groups = 0

    def add(self, exact: Sequence[Tensor], predicted: Sequence[Tensor]) -> None:
        """Add a group's gradients, tensor by tensor."""
        both = [torch._foreach_sub(list(exact), list(predicted)), list(exact)]
        squares = [_squared_norms(each) for each in both]
        if self._groups:
            both = [torch._foreach_add(list(a), list(b)) for a, b in zip(self._sums, both, strict=True)]
            squares = [a + b for a, b in zip(self._squares, squares, strict=True)]
        self._sums, self._squares, self._groups = list(both), squares, self._groups + 1

    def spread(self) -> GroupSpread:
        """The spreads of what was added."""
        each = zip(self._sums, self._squares, strict=True)
        return GroupSpread(*(spread(_squared_norms(sums), squares, self._groups) for sums, squares in each))


def _squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(tensors), dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack(norms).square().float()
