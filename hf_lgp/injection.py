"""Injection: a head over the whole micro-batch whose trunk gradient comes from a part of it.

The model runs with a graph on the control examples only; the rest ran before, without one. :class:`SplicedHead` stands
at the head's output. Forward, it returns the logits of *all* examples in their original order, so that the model's own
loss, label smoothing or a user's loss function sees the whole micro-batch and computes its true loss. Backward, it
receives the residuals ``R = dL/dlogits`` of all examples, in exactly the normalisation that the user's loss, gradient
accumulation and loss scaling give them, and returns

- the head's own gradient, exact on all examples: ``R^T a``;
- the control examples' feature gradients ``w R_S W``, reweighted by ``w = m / m_c`` so that their sum is unbiased;
- the correction ``alpha * (sum_all g_hat - w sum_S g_hat)`` for every trunk parameter, a constant of the backward pass.

Everything is linear in ``R``, so whatever scales the loss scales the whole estimate. To autograd, DDP and gradient scalers
this is one ordinary loss with one ordinary backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Correction = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor | None]]
"""``(features, residuals, pullbacks)`` of all examples, control first, to one gradient per trunk parameter."""


@dataclass
class Splice:
    """What :class:`SplicedHead` needs besides tensors that carry gradients.

    Attributes:
        features: Head inputs of the prediction examples, shape ``(m - m_c, D)``, without graph.
        logits: Their logits, shape ``(m - m_c, C)``.
        order: Position of every example in the original micro-batch, control examples first, shape ``(m,)``, int64.
        weight: Control weight ``w``, a float or a scalar tensor.
        correction: Computes the trunk's corrections.
    """

    features: Tensor
    logits: Tensor
    order: Tensor
    weight: float | Tensor
    correction: Correction


class SplicedHead(torch.autograd.Function):
    """Logits of all examples from those of the control examples; see the module's description."""

    @staticmethod
    def forward(
        ctx: Any,
        splice: Splice,
        features: Tensor,
        logits: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        """Splice the logits.

        Args:
            ctx: Autograd's context.
            splice: The prediction part.
            features: Head inputs of the control examples, shape ``(m_c, D)``, with graph.
            logits: Logits of the control examples, shape ``(m_c, C)``; their graph is not used.
            weight: The head's weight, shape ``(C, D)``.
            bias: The head's bias, shape ``(C,)``, or None.
            parameters: The trunk parameters that receive corrections.

        Returns:
            Logits of the whole micro-batch in its original order, shape ``(m, C)``.
        """
        ctx.splice = splice
        ctx.save_for_backward(features, weight)
        ctx.biased = bias is not None
        both = torch.cat([logits, splice.logits.to(logits.dtype)])
        return torch.empty_like(both).index_copy_(0, splice.order, both)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Residuals in; feature gradients, exact head gradient and trunk corrections out."""
        (grad_output,) = grad_outputs
        features, weight = ctx.saved_tensors
        splice: Splice = ctx.splice
        wide = torch.promote_types(torch.float32, grad_output.dtype)
        residuals = grad_output.index_select(0, splice.order).to(wide)
        pullbacks = residuals @ weight.to(wide)
        every = torch.cat([features.to(wide), splice.features.to(wide)])
        control = pullbacks[: len(features)] * splice.weight
        weight_gradient = (residuals.T @ every).to(weight.dtype) if ctx.needs_input_grad[3] else None
        bias_gradient = residuals.sum(0).to(weight.dtype) if ctx.biased and ctx.needs_input_grad[4] else None
        corrections = splice.correction(every, residuals, pullbacks)
        return None, control.to(features.dtype), None, weight_gradient, bias_gradient, *corrections


def splice_head(
    head: nn.Linear, features: Tensor, logits: Tensor, splice: Splice, parameters: Sequence[Tensor]
) -> Tensor:
    """Apply :class:`SplicedHead` at a linear head's output.

    Args:
        head: The classification head.
        features: Its input on the control examples, with graph, shape ``(m_c, D)``.
        logits: Its output on the control examples, shape ``(m_c, C)``.
        splice: The prediction part.
        parameters: Trunk parameters, in the order of ``splice.correction``'s result.

    Raises:
        ValueError: If features or logits are not matrices: one row per example is what the splice rests on.
    """
    if features.dim() != 2 or logits.dim() != 2:
        raise ValueError(
            f"The head must map one feature row per example to one row of logits, got input {tuple(features.shape)} and "
            f"output {tuple(logits.shape)}. Name another module with `lgp_head`, or use `lgp_control_fraction=1`."
        )
    result: Tensor = SplicedHead.apply(splice, features, logits.detach(), head.weight, head.bias, *parameters)
    return result
