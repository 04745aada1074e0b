"""Per-example gradients of layers in factored form, taken from an ordinary forward and backward.

The gradient of one example with respect to a weight matrix is ``G_i = sum_t l_{i,t} r_{i,t}^T``, with ``l`` the gradient of the layer's output and ``r`` its input. Forward hooks note a layer's
input, tensor hooks receive its output's gradient; they change no value. A bias is a last column of ones in ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

Factors = tuple[Tensor, Tensor]
"""Gradients ``G_i = l_i^T r_i`` of ``b`` examples: ``l (b, T, rows)`` and ``r (b, T, cols)``."""


class Layer(NamedTuple):
    """A layer whose trained parameters, a weight and perhaps a bias, have their gradient predicted as one matrix ``(rows, cols)``."""

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    rows: int
    cols: int

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        """Gradients of :attr:`parameters` from a gradient matrix, shape ``(rows, cols)``."""
        if isinstance(self.module, nn.LayerNorm):
            return list(matrix)
        weight = self.parameters[0]
        return [matrix[:, : weight[0].numel()].reshape(weight.shape), matrix[:, -1]][: len(self.parameters)]


def find_layers(trunk: nn.Module) -> tuple[Layer, ...]:
    """The linear layers, layer norms and convolutions of a trunk whose weight is trained: all else has no prediction."""
    layers = []
    for module in trunk.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        parameters = (weight, bias) if isinstance(bias, nn.Parameter) and bias.requires_grad else (weight,)
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if isinstance(module, nn.LayerNorm) and weight.dim() == 1:
            layers.append(Layer(module, parameters, len(parameters), weight.numel()))
        elif plain or type(module) is nn.Linear:
            layers.append(Layer(module, parameters, len(weight), weight[0].numel() + len(parameters) - 1))
    return tuple(layers)


def _factors(layer: Layer, x: Tensor, delta: Tensor, b: int) -> Factors:
    """Gradients of ``b`` examples, from what a layer read and the gradient of what it returned."""
    module = layer.module
    if isinstance(module, nn.LayerNorm):
        if getattr(module, "data_format", None) == "channels_first":
            x, delta = x.movedim(1, -1), delta.movedim(1, -1)
        terms = (delta * F.layer_norm(x, module.normalized_shape, eps=module.eps), delta)[: layer.rows]
        return _formed(torch.stack([t.reshape(b, -1, layer.cols).sum(1) for t in terms], dim=1))
    if isinstance(module, nn.Conv2d):
        windows: dict[str, Any] = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
        if module.groups > 1:
            shape = b * layer.rows, *module.weight.shape[1:]
            planes = x.reshape(1, -1, *x.shape[2:]), shape, delta.reshape(1, -1, *delta.shape[2:])
            weight = conv2d_weight(*planes, **windows, groups=b * module.groups).view(b, layer.rows, -1)
            return _formed(torch.cat([weight, delta.sum((2, 3))[..., None]], -1)[..., : layer.cols])
        x, delta = F.unfold(x, module.kernel_size, **windows).mT, delta.flatten(2).mT
    left, right = delta.reshape(b, -1, layer.rows), x.reshape(b, -1, x.shape[-1])
    return left, torch.cat([right, torch.ones_like(right[..., :1])], -1)[..., : layer.cols]


def _formed(gradients: Tensor) -> Factors:
    return torch.eye(gradients.shape[1], dtype=gradients.dtype, device=gradients.device).expand(
        len(gradients), -1, -1
    ), gradients


@contextmanager
def recorded(
    layers: Sequence[Layer], examples: int, count: int, dtype: torch.dtype, arrived: Callable[[int, Factors], None]
) -> Iterator[None]:
    """A context for a forward whose backward will tell the gradients of the first ``count`` of its examples.

    ``arrived`` is called in the backward, once for each call of a layer, with its position and its gradients, in ``dtype`` as products of scaled gradients
    leave the range of half precision. A call whose rows do not divide among the examples is left out.
    """

    def gradient(position: int, x: Tensor, delta: Tensor) -> None:
        if len(x) and not len(x) % examples and not len(delta) % examples:
            x, delta = (t[: count * (len(t) // examples)].to(dtype) for t in (x, delta))
            arrived(position, _factors(layers[position], x, delta, count))

    def ran(position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            out.register_hook(partial(gradient, position, x.detach()))

    with ExitStack() as stack:
        for position, layer in enumerate(layers if count else ()):
            # Before the hooks of others, which may replace the output.
            handle = layer.module.register_forward_hook(partial(ran, position), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield
