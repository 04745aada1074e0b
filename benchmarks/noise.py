"""An arm that tells noise from everything else that predictions might do: exact gradients, with noise like that of predicted ones added."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_lgp import LGPTrainer


class NoisyTrainer(LGPTrainer):
    """Exact gradients plus the difference of two estimates of the same batch over the square root of two.

    The two estimates come from independent draws of control examples, so the difference has twice the variance that a draw adds, and whatever bias
    they had in common is gone. What this arm loses, variance costs. Wants a fixed control fraction and no accumulation.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One exact step, and two predicted ones."""
        loss = Trainer.training_step(self, model, inputs, num_items_in_batch)
        exact, estimates = _taken(model), list[dict[nn.Parameter, Tensor]]()
        for _ in range(2):  # each micro-batch of a step has a draw of its own
            super().training_step(model, inputs, num_items_in_batch)
            estimates.append(_taken(model))
        one, other = estimates
        for parameter, gradient in exact.items():
            parameter.grad = gradient.add_(one[parameter] - other[parameter], alpha=math.sqrt(0.5))
        return loss


def _taken(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The gradients of a model, which has none afterwards."""
    found = {p: p.grad for p in model.parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
