"""A model's trunk, run so that only some examples have a graph through it; the paper's predictor stands in for the others.

The trunk is one module, whatever is in it. What it returns has the true value for every example. In the backward each tensor of its output brings ``delta`` for all
examples, and the trunk's parameters get formula (1) of :mod:`hf_lgp.splice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..control.plan import StepPlan
from ..rows.parts import UnknownBlock, forward_replaced
from .call import Observed, TrunkCall
from .factored import find_layers
from .predictor import LinearPredictor


def find_trunk(model: nn.Module) -> nn.Module:
    """The part of a model below its head: the module that its ``base_model_prefix`` names.

    Raises:
        UnknownBlock: If there is none, or if its gradients cannot be predicted; the message says why.
    """
    trunk = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(trunk, nn.Module) or trunk is model:
        raise UnknownBlock("it does not say by `base_model_prefix` which of its modules is its trunk")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trunk.modules()):
        raise UnknownBlock("a BatchNorm in its trunk couples the examples of a batch")
    if not find_layers(trunk):
        raise UnknownBlock(
            "no linear layer, layer norm or convolution of its trunk is trained, so there is no gradient to predict"
        )
    return trunk


@contextmanager
def spliced_trunk(
    trunk: nn.Module, plan: StepPlan, predictor: LinearPredictor, observed: Observed = lambda _: None
) -> Iterator[None]:
    """A context in which a trunk follows a plan, forward and backward; the predictor learns from every backward.

    A call without gradients is left as it is.

    Args:
        trunk: The trunk.
        plan: The plan.
        predictor: A predictor of this trunk.
        observed: Is told what a measuring plan measured, for each call of the trunk.

    Raises:
        SpliceError: In the model's forward, if what the trunk returns cannot be put together from parts.
    """
    forward, calls = trunk.forward, 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        calls += 1
        return TrunkCall(forward, plan, calls - 1, predictor, observed, args, kwargs).finish()

    with forward_replaced((trunk, run)):
        yield
