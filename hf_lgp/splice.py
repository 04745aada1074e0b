"""One backward for two streams of a stack of blocks: section 1 of the method as code.

A stack maps ``h0 (m, T, D)`` to ``H (m, T, D)``. *Control* examples ``S``, ``m_c`` of ``m`` drawn uniformly, go through it with a graph, all others without;
``H`` has the true value for every example, so what comes behind it is ordinary autograd, and ``delta_i = dL/dH_i`` is exact. With ``J_i`` the
stack's Jacobian and ``J~_i`` the predictor's,

    G = (m / m_c) sum_{i in S} J_i^T delta_i + sum_i w_i J~_i^T delta_i,    w_i = 1 - (m / m_c) [i in S]        (1)

is unbiased for ``sum_i J_i^T delta_i``: no ``delta_i`` depends on the draw, and ``E[m / m_c [i in S]] = 1``. The idea is that of *Linear Gradient
Prediction with Control Variates*, arXiv 2511.05187.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .sealed import SpliceError

Pull = Callable[..., tuple[Tensor | None, Sequence[Tensor | None]]]
"""From ``delta (m, T, D)``, or what there is of several outputs, the gradients of ``h0`` and of the parameters."""


class Spliced(torch.autograd.Function):
    """``H`` as a function of ``h0`` and of the stack's parameters: its values are given, by a function, and its backward is another.

    Raises:
        SpliceError: In a second backward, or where the gradient is differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, h0: Tensor | None, value: Callable[[], Any], pull: Pull, *parameters: Tensor) -> Any:
        ctx.pull = pull
        # An output that is not read has no gradient, which is not the same as zeros.
        ctx.set_materialize_grads(False)
        return value()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Any, ...]:
        if ctx.pull is None or torch.is_grad_enabled():
            error = SpliceError("its loss is differentiated twice")
            error.in_backward = ctx.pull is None
            raise error
        pull, ctx.pull = ctx.pull, None
        if all(delta is None for delta in deltas):
            return (None,) * len(ctx.needs_input_grad)
        try:
            of_h0, of_parameters = pull(*deltas)
        except SpliceError as error:
            error.in_backward = True
            raise
        return of_h0, None, None, *of_parameters


@contextmanager
def no_gradient_taken() -> Iterator[None]:
    """A context for what makes a loss: a gradient taken in it would be an estimate, and a loss made of one no estimate at all.

    Raises:
        SpliceError: Where one is taken through a splice.
    """

    def refuse(ctx: Any, *deltas: Tensor | None) -> Any:
        error = SpliceError("its loss is made of gradients")
        error.in_backward = True
        raise error

    with patch.object(Spliced, "backward", refuse):
        yield


class Gradients:
    """Sums of exact and predicted gradients, by parameter; both terms of (1), whose weights are in ``delta`` already.

    A step whose predictions are not finite has none: control examples have their exact gradients. Nothing waits for the device to know. If ``loud``, there is
    somebody who watches, such as loss scaling: such a step's gradients are all infinite, so that it is skipped and the scale lowered.
    """

    def __init__(self, parameters: Mapping[int, Tensor], loud: bool = False) -> None:
        self._parameters, self._instead = parameters, float("inf") if loud else 0.0
        self._pieces: list[tuple[Sequence[int], Sequence[Tensor], Sequence[Tensor]]] = []  # keys, exact, predicted
        self._totals: dict[int, Tensor] = {}
        self._checks: list[Tensor] = []

    def add_exact(self, exact: Mapping[int, Tensor | None]) -> None:
        """Add a block's gradients where nothing is predicted, by parameter; blocks may share some."""
        for key, gradient in exact.items():
            if gradient is not None:
                self._sum(key, gradient)

    def add(self, exact: Mapping[int, Tensor | None], predicted: Mapping[int, Tensor | None]) -> None:
        """Add a block's gradients of both kinds, perhaps in half precision."""
        by_type: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, Tensor, Tensor]]] = {}
        for key, g in exact.items():
            p = predicted[key]
            if (like := p if g is None else g) is not None:
                triple = key, torch.zeros_like(like) if g is None else g, torch.zeros_like(like) if p is None else p
                by_type.setdefault((like.dtype, self._parameters[key].dtype), []).append(triple)
        for triples in by_type.values():
            keys, exacts, predictions = zip(*triples, strict=True)
            if predictions[0].device.type != "cpu":  # as one tensor: there launches cost, on a CPU passes over memory
                predictions = (torch.cat([p.flatten() for p in predictions]),)
            for t in predictions:
                self._check(t)
            self._pieces.append((keys, exacts, predictions))

    def _check(self, t: Tensor) -> None:
        self._checks.append(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)))

    def _sum(self, key: int, gradient: Tensor) -> None:
        gradient = gradient.to(self._parameters[key].dtype)
        self._totals[key] = self._totals[key] + gradient if key in self._totals else gradient

    def totals(self, of_rows: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """The predicted gradient of rows, if it is finite along with all others, and the sums, None for a parameter that has none."""
        if of_rows is not None:
            self._check(of_rows)
        if self._checks:
            bad = torch.stack(self._checks).mul_(0.0).sum() != 0.0
        for keys, exact, predicted in self._pieces:
            if predicted[0].device.type == "cpu":
                if not bad:  # new tensors: two parameters may have been given the same one
                    exact = torch._foreach_add(list(predicted), list(exact))
                elif self._instead:
                    exact = [torch.full_like(g, self._instead) for g in exact]
            else:
                flat, sizes = predicted[0].masked_fill_(bad, self._instead), [g.numel() for g in exact]
                torch._foreach_add_([t.view_as(g) for t, g in zip(flat.split(sizes), exact, strict=True)], list(exact))
                pieces = flat.to(self._parameters[keys[0]].dtype).split(sizes)
                exact = [piece.view_as(g) for piece, g in zip(pieces, exact, strict=True)]
            for key, total in zip(keys, exact, strict=True):
                self._sum(key, total)
        self._pieces.clear()
        of_rows = None if of_rows is None else of_rows.masked_fill_(bad, self._instead)
        return of_rows, [self._totals.get(key) for key in self._parameters]
