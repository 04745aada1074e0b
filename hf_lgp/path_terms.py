"""Path terms: the class path's gradient of one module's parameters, for many examples at once.

A term holds the few rows per example that the class token's path leaves at a module and turns them into two things: the
parameters' gradients summed over examples (what enters a training step), and per-example
:class:`~hf_lgp.factors.Factors` (what predictions are fitted on).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factors import Factors

Lifted = tuple[Tensor, Tensor]
"""A gradient matrix ``L R^T`` by its two factors, shapes ``(rows, k)`` and ``(cols, k)``."""


class PathTerm(ABC):
    """Per-example gradients of the parameters of one :class:`~hf_lgp.rules.Rule`."""

    @abstractmethod
    def total(self, weights: Tensor, lifted: Lifted | None = None) -> list[Tensor]:
        """``sum_i weights_i g_i`` of every parameter of the rule, plus a factored gradient matrix.

        Args:
            weights: One factor per example, shape ``(m,)``.
            lifted: ``(L, R)``, shapes ``(rows, k)`` and ``(cols, k)``, standing for the gradient matrix ``L R^T`` of the rule.
        """

    @abstractmethod
    def factors(self, examples: slice) -> Factors:
        """The same gradients example by example, as the rule's gradient matrix."""

    @abstractmethod
    def only(self, finite: Tensor) -> PathTerm:
        """The same with zeros, whatever stood there, for the examples outside of ``finite``, bool ``(m,)``."""


@dataclass(frozen=True)
class RowTerm(PathTerm):
    """A linear layer on rows: ``left`` (m, S, out) output gradients, ``right`` (m, S, in) inputs."""

    left: Tensor
    right: Tensor
    biased: bool

    def total(self, weights: Tensor, lifted: Lifted | None = None) -> list[Tensor]:  # noqa: D102
        left, right = (self.left * _column(weights, self.left)).flatten(0, 1), self.right.flatten(0, 1)
        bias = left.sum(0) if self.biased else None
        if lifted is not None:
            # One product for both parts: the lift is k more rows.
            over, under = (side.to(left.dtype) for side in lifted)
            left, right = torch.cat([left, over.T]), torch.cat([right, under[: right.shape[1]].T])
            bias = None if bias is None else bias + lifted[0] @ lifted[1][-1]
        gradient = left.T @ right
        return [gradient] if bias is None else [gradient, bias]

    def factors(self, examples: slice) -> Factors:  # noqa: D102
        return Factors(self.left[examples], self.right[examples], self.left.shape[-1], ones=self.biased)

    def only(self, finite: Tensor) -> PathTerm:  # noqa: D102
        return replace(self, left=_only(self.left, finite), right=_only(self.right, finite))


@dataclass(frozen=True)
class HeadsTerm(PathTerm):
    """A key or value projection seen by a few query rows: for head ``h`` the outer products of ``left`` and ``right`` row ``h``.

    ``left`` has shape (m, S, H, out / H), ``right`` (m, S, H, in): the layer's inputs are ``gain * right + shift``, where ``gain`` and
    ``shift`` have shape (in,). The bias gradient is ``left`` for values (attention weights sum to one) and zero for keys (softmax is
    blind to a common shift).
    """

    left: Tensor
    right: Tensor
    biased: bool
    bias_is_zero: bool
    gain: Tensor | None = None
    shift: Tensor | None = None

    def total(self, weights: Tensor, lifted: Lifted | None = None) -> list[Tensor]:  # noqa: D102
        left, right = (self.left * _column(weights, self.left)).flatten(0, 1), self.right.flatten(0, 1)
        gradient = torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1)).flatten(0, 1)
        summed = left.sum(0).flatten() if self.shift is not None or not self.bias_is_zero else None
        if self.gain is not None:
            gradient = gradient.mul_(self.gain.to(gradient.dtype))
        if self.shift is not None and summed is not None:
            gradient = gradient.addr_(summed, self.shift.to(gradient.dtype))
        bias = None
        if self.biased:
            bias = gradient.new_zeros(len(gradient)) if self.bias_is_zero else summed
        if lifted is not None:
            over, under = (side.to(gradient.dtype) for side in lifted)
            gradient = gradient.addmm_(over, under[: gradient.shape[1]].T)
            bias = None if bias is None else bias + lifted[0] @ lifted[1][-1]
        return [gradient] if bias is None else [gradient, bias]

    def factors(self, examples: slice) -> Factors:  # noqa: D102
        left, right = self.left[examples], self.right[examples].flatten(1, 2)
        if self.gain is not None:
            right = right * self.gain.to(right.dtype)
        if self.shift is not None:
            right = right + self.shift.to(right.dtype)
        heads, size = left.shape[2:]
        # Row h speaks for the outputs of head h alone.
        rows = torch.diag_embed(left.transpose(2, 3)).permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)
        if self.biased and self.bias_is_zero:
            right = torch.cat([right, right.new_zeros(*right.shape[:-1], 1)], dim=-1)
        return Factors(rows, right, heads * size, ones=self.biased and not self.bias_is_zero)

    def only(self, finite: Tensor) -> PathTerm:  # noqa: D102
        return replace(self, left=_only(self.left, finite), right=_only(self.right, finite))


@dataclass(frozen=True)
class DenseTerm(PathTerm):
    """Gradients that are small enough to be formed: ``gradients`` (m, rows, cols), one row per parameter or one table."""

    gradients: Tensor
    shapes: tuple[torch.Size, ...]

    def total(self, weights: Tensor, lifted: Lifted | None = None) -> list[Tensor]:  # noqa: D102
        summed = (weights.to(self.gradients.dtype) @ self.gradients.flatten(1)).view(self.gradients.shape[1:])
        if lifted is not None:
            summed = torch.addmm(summed.to(lifted[0].dtype), lifted[0], lifted[1].T)
        if len(self.shapes) == 1:
            return [summed.reshape(self.shapes[0])]
        return [row.reshape(shape) for row, shape in zip(summed, self.shapes, strict=True)]

    def factors(self, examples: slice) -> Factors:  # noqa: D102
        return Factors(None, self.gradients[examples], self.gradients.shape[1])

    def only(self, finite: Tensor) -> PathTerm:  # noqa: D102
        return replace(self, gradients=_only(self.gradients, finite))


def _only(rows: Tensor, finite: Tensor) -> Tensor:
    return torch.where(finite.view(-1, *[1] * (rows.dim() - 1)), rows, rows.new_zeros(()))


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
