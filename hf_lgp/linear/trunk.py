"""A model's trunk, run so that only some examples have a graph through it; the paper's predictor stands in for the others.

The trunk is one module, whatever is in it. What it returns has the true value for every example. In the backward each tensor of its output brings ``delta`` for all
examples, and the trunk's parameters get formula (1) of :mod:`hf_lgp.splice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from ..call import Observed
from ..control.plan import StepPlan
from ..rows.parts import NothingTrained, UnknownBlock, forward_replaced, refuse_listeners, refuse_reuse
from ..sealed import SpliceError
from .call import TrunkCall
from .factored import find_layers
from .predictor import LinearPredictor


def find_trunk(model: nn.Module) -> nn.Module:
    """The module below a model's head, named by its ``base_model_prefix``; :class:`UnknownBlock` says why its gradients cannot be predicted."""
    trunk = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(trunk, nn.Module) or trunk is model:
        raise UnknownBlock("it does not say by `base_model_prefix` which of its modules is its trunk")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trunk.modules()):
        raise UnknownBlock("a BatchNorm in its trunk couples the examples of a batch")
    if not any(p.requires_grad for p in trunk.parameters()):
        raise NothingTrained("nothing in its trunk is trained, so there is no gradient to predict")
    if any(p._backward_hooks for p in trunk.parameters()):
        raise UnknownBlock("parameters of its trunk have hooks, which would run twice")
    if not find_layers(trunk):
        raise UnknownBlock("no linear layer, layer norm or convolution of its trunk is trained")
    return trunk


@contextmanager
def spliced_trunk(
    trunk: nn.Module, plan: StepPlan, predictor: LinearPredictor, observed: Observed = lambda _: None
) -> Iterator[None]:
    """A context in which a trunk follows a plan, forward and backward; its predictor learns from every backward.

    ``observed`` is told what a measuring plan measured, for each call of the trunk. A call without gradients is left as it is. The model's forward raises
    :class:`~hf_lgp.sealed.SpliceError` if the trunk's arguments or what it returns cannot be taken apart by examples.
    """
    forward, numbers = trunk.forward, count()

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_reuse()
            refuse_listeners(*trunk.children())
            if [id(p) for p in trunk.parameters() if p.requires_grad] != [id(p) for p in predictor.parameters]:
                raise SpliceError("other parameters of its trunk are trained than at the start")
            if any(p._backward_hooks for p in predictor.parameters):
                raise SpliceError("parameters of its trunk have hooks, which would run twice")
            return TrunkCall(predictor, plan, next(numbers), observed, args, kwargs).run(forward)
        return forward(*args, **kwargs)

    with forward_replaced((trunk, run)):
        yield
