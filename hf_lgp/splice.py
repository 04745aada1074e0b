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


class Enter(torch.autograd.Function):
    """``h0`` of the control examples, and a tensor shaped like all of ``h0`` without values, from which :class:`Predicted` starts.

    Backward, what comes back through either, in the call's order, is added and brought into the examples' own.
    """

    @staticmethod
    def forward(ctx: Any, h0: Tensor, order: Tensor, inverse: Tensor, controls: int) -> tuple[Tensor, Tensor]:
        ctx.inverse, ctx.controls = inverse, controls
        return h0.index_select(0, order[:controls]), h0.new_zeros(()).expand(h0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_control: Tensor, predicted: Tensor) -> tuple[Any, ...]:
        predicted[: ctx.controls] += of_control  # nobody else holds it
        return predicted.index_select(0, ctx.inverse), None, None, None


class Predicted(torch.autograd.Function):
    """Stands for the predictor in the graph: its backward gives ``h0``, in the call's order, and the parameters their predicted gradients.

    Its output has the shape of ``H`` and no values.
    """

    @staticmethod
    def forward(ctx: Any, h0: Tensor, predict: Predict, *parameters: Tensor) -> Tensor:
        ctx.predict = predict
        return h0.new_zeros(()).expand(h0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        of_h0, of_parameters = _finite_or_none_at_all(*ctx.predict(delta))
        return of_h0, None, *of_parameters


def _finite_or_none_at_all(
    of_h0: Tensor | None, of_parameters: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The predictions, or zeros for all where one is not finite: control examples have their exact gradients. Nothing waits for the device."""
    there = [g for g in of_parameters if g is not None]
    if of_h0 is None and not there:
        return None, [None for _ in of_parameters]
    sums = [] if of_h0 is None else [of_h0.sum(dtype=torch.promote_types(of_h0.dtype, torch.float32))]
    if there:  # as one, since every tensor by itself would cost a launch
        flat = torch.cat([g.flatten() for g in there])
        sums.append(flat.sum(dtype=torch.promote_types(flat.dtype, torch.float32)))
    bad = (sums[0] + sums[-1]).mul(0.0).ne(0.0)
    if there:
        pieces = iter(flat.masked_fill_(bad, 0.0).split([g.numel() for g in there]))
    return (
        None if of_h0 is None else of_h0.masked_fill_(bad, 0.0),
        [None if g is None else next(pieces).view_as(g).to(g.dtype) for g in of_parameters],
    )


class Combine(torch.autograd.Function):
    """The values of all examples from those of both streams; backward, ``delta`` is split and weighted as (1) says."""

    @staticmethod
    def forward(ctx: Any, control: Tensor, predicted: Tensor, others: Tensor, order: Tensor) -> Tensor:
        ctx.order, ctx.controls = order, len(control)
        value = control.new_empty(len(order), *control.shape[1:])
        return value.index_copy_(0, order[: len(control)], control).index_copy_(0, order[len(control) :], others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        delta = delta.index_select(0, ctx.order)
        m, controls = len(delta), ctx.controls
        weights = control_weights(m, controls, delta.dtype, delta.device).view(m, *[1] * (delta.dim() - 1))
        return control_scale(m, controls) * delta[:controls], weights * delta, None, None


class Apart(torch.autograd.Function):
    """Control examples that were run by a graph of their own, which only this function's backward walks."""

    @staticmethod
    def forward(ctx: Any, control: Tensor, value: Tensor, pull: Predict, *parameters: Tensor) -> Tensor:
        ctx.pull = pull
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        of_control, of_parameters = ctx.pull(delta)
        return of_control, None, None, *of_parameters
