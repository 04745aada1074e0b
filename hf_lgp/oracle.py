"""A slow, exact reference that tests and benchmarks compare with: per-example gradients, one full gradient for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[[Callable[..., Any], dict[str, Tensor]], Tensor]
"""``loss(model, example)``: a scalar, from a stand-in for the model that is called like it, and a batch of one example."""


def per_example_gradients(model: nn.Module, loss: Loss, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exact gradients of every example's own loss.

    The model must treat examples independently and draw no random numbers (no active dropout).

    Args:
        model: Any module; its parameters and their ``.grad`` are left as they are.
        loss: Scalar loss of one example, ``loss(call, example)``: ``call`` runs the model, and ``example`` holds one entry of
            every input, shape ``(1, ...)``. For a model that computes its own loss: ``lambda call, x: call(**x).loss``.
        inputs: A batch of ``m`` examples: tensors of shape ``(m, ...)`` by name.

    Returns:
        Gradients by the name of every trainable parameter, shape ``(m, *parameter.shape)``.
    """
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of_one(parameters: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, parameters, args, kwargs)

        return loss(call, {name: value[None] for name, value in example.items()})

    gradients: dict[str, Tensor] = vmap(grad(loss_of_one), in_dims=(None, 0))(trainable, dict(inputs))
    return gradients
