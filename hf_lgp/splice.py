"""One backward for two streams of a stack of blocks: section 1 of the method as code.

A stack maps ``h0 (m, T, D)`` to ``H (m, T, D)``. *Control* examples ``S``, ``m_c`` of ``m`` drawn uniformly, go through it with a graph, all others without;
``H`` has the true value for every example, so what comes behind it is ordinary autograd, and ``delta_i = dL/dH_i`` is exact. With ``J_i`` the
stack's Jacobian and ``J~_i`` the predictor's,

    G = (m / m_c) sum_{i in S} J_i^T delta_i + sum_i w_i J~_i^T delta_i,    w_i = 1 - (m / m_c) [i in S]        (1)

is unbiased for ``sum_i J_i^T delta_i``: no ``delta_i`` depends on the draw, and ``E[m / m_c [i in S]] = 1``. The idea is that of *Linear Gradient
Prediction with Control Variates*, arXiv 2511.05187.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .estimator import control_scale, control_weights

Predict = Callable[[Tensor], tuple[Tensor | None, Sequence[Tensor | None]]]
"""From weighted ``delta (m, T, D)``, control examples first, the predicted gradients of ``h0`` in the same order and of the parameters."""


class Predicted(torch.autograd.Function):
    """Stands for the predictor in the graph: its backward gives ``h0`` and the parameters their predicted gradients.

    Its output has the shape of ``H`` and no values.
    """

    @staticmethod
    def forward(ctx: Any, h0: Tensor, predict: Predict, inverse: Tensor, *parameters: Tensor) -> Tensor:
        ctx.predict, ctx.inverse = predict, inverse
        return h0.new_zeros(()).expand(h0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        of_h0, of_parameters = _finite_or_none_at_all(*ctx.predict(delta))
        if of_h0 is not None:
            of_h0 = of_h0.index_select(0, ctx.inverse)
        return of_h0, None, None, *of_parameters


def _finite_or_none_at_all(
    of_h0: Tensor | None, of_parameters: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The predictions, or zeros for all where one is not finite: control examples have their exact gradients. Nothing waits for the device."""
    there = [g for g in (of_h0, *of_parameters) if g is not None]
    norms = torch._foreach_norm(there, dtype=torch.promote_types(there[0].dtype, torch.float32))
    finite = torch.stack(norms).isfinite().all()
    of_h0, *of_parameters = (None if g is None else g.where(finite, 0.0) for g in (of_h0, *of_parameters))
    return of_h0, of_parameters


class Combine(torch.autograd.Function):
    """The values of all examples from those of both streams; backward, ``delta`` is split and weighted as (1) says."""

    @staticmethod
    def forward(ctx: Any, control: Tensor, predicted: Tensor, others: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.order, ctx.controls = order, len(control)
        return torch.cat([control, others]).index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        delta = delta.index_select(0, ctx.order)
        m, controls = len(delta), ctx.controls
        weights = control_weights(m, controls, delta.dtype, delta.device).view(m, *[1] * (delta.dim() - 1))
        return control_scale(m, controls) * delta[:controls], weights * delta, None, None, None


class Grouped(torch.autograd.Function):
    """Control examples that were run in groups, each with a graph of its own that only this function's backward walks."""

    @staticmethod
    def forward(ctx: Any, control: Tensor, value: Tensor, pull: Predict, *parameters: Tensor) -> Tensor:
        ctx.pull = pull
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        of_control, of_parameters = ctx.pull(delta)
        return of_control, None, None, *of_parameters
