"""Per-example gradients of layers in factored form, taken from an ordinary forward and backward.

The gradient of one example with respect to a weight matrix is ``G_i = sum_t l_{i,t} r_{i,t}^T``, with ``l`` the gradient of the layer's output and ``r`` its input. Forward hooks note a layer's
input, tensor hooks receive its output's gradient; they change no value. A bias is a last column of ones in ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """Gradients ``G_i``, shape ``(b, rows, cols)`` if they were formed.

    Attributes:
        left: ``l``, shape ``(b, T, rows)``; None where ``right`` is the gradient itself.
        right: ``r``, shape ``(b, T, cols)``, or the gradient, shape ``(b, rows, cols)``.
    """

    left: Tensor | None
    right: Tensor

    def take(self, examples: int) -> Factors:
        """The gradients of the first examples."""
        return Factors(None if self.left is None else self.left[:examples], self.right[:examples])

    def times(self, matrix: Tensor) -> Tensor:
        """``G_i M`` for ``M`` of shape ``(cols, k)`` or ``(b, cols, k)``."""
        rows = self.right @ matrix
        return rows if self.left is None else self.left.mT @ rows

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """``G_i^T M`` for ``M`` of shape ``(rows, k)`` or ``(b, rows, k)``."""
        return self.right.mT @ (matrix if self.left is None else self.left @ matrix)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        """``A^T G_i B`` for ``A`` of shape ``(rows, k_a)`` and ``B`` of shape ``(cols, k_b)``; shape ``(b, k_a, k_b)``."""
        rows = self.right @ right
        return left.T @ rows if self.left is None else (self.left @ left).mT @ rows

    def dense(self) -> Tensor:
        """The gradients, formed: for small layers and tests."""
        return self.right if self.left is None else self.left.mT @ self.right

    def moment_products(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Centred second moments applied to bases: one power step on either side.

        With ``G~_i = G_i - mean G``: ``(1/b) sum_i G~_i G~_i^T A``, shape ``(rows, k_a)``, and ``(1/b) sum_i G~_i^T G~_i B``, shape ``(cols, k_b)``.
        """
        # sum_i (G_i - G)(G_i - G)^T A = sum_i G_i (Z_i - Z) with Z_i = G_i^T A and Z its mean.
        from_left, from_right = self.transposed_times(left), self.times(right)
        left_product = self.times(from_left - from_left.mean(0)).mean(0)
        return left_product, self.transposed_times(from_right - from_right.mean(0)).mean(0)


@dataclass(frozen=True)
class Layer:
    """A layer whose gradient is predicted as one matrix.

    Attributes:
        module: The layer.
        parameters: Those of its parameters that are trained: its weight and, perhaps, its bias.
        rows: Rows of the matrix.
        cols: Its columns, the bias's among them.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    rows: int
    cols: int

    def gradients(self, matrix: Tensor) -> list[Tensor]:
        """Gradients of :attr:`parameters` from a gradient matrix, shape ``(rows, cols)``."""
        if isinstance(self.module, nn.LayerNorm):
            return list(matrix)
        weight = self.parameters[0]
        if len(self.parameters) == 1:
            return [matrix.reshape(weight.shape)]
        return [matrix[:, :-1].reshape(weight.shape), matrix[:, -1]]


def find_layers(trunk: nn.Module) -> tuple[Layer, ...]:
    """The layers of a trunk whose per-example gradients are known: linear ones, layer norms, convolutions.

    Everything else, and layers whose weight is frozen, has no prediction.
    """
    return tuple(layer for layer in map(_layer, trunk.modules()) if layer is not None)


def _layer(module: nn.Module) -> Layer | None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return None
    parameters = (weight, bias) if isinstance(bias, nn.Parameter) and bias.requires_grad else (weight,)
    if isinstance(module, nn.LayerNorm):
        return Layer(module, parameters, len(parameters), weight.numel()) if weight.dim() == 1 else None
    if type(module) is nn.Conv2d:
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        depthwise = module.groups == module.in_channels == module.out_channels
        if not plain or not (module.groups == 1 or depthwise):
            return None
    elif type(module) is not nn.Linear:
        return None
    return Layer(module, parameters, len(weight), weight[0].numel() + len(parameters) - 1)


def factors_of(
    layer: Layer, inputs: Tensor, delta: Tensor, examples: int, count: int, dtype: torch.dtype
) -> Factors | None:
    """Gradients of the first examples in one call of a layer.

    Args:
        layer: The layer.
        inputs: What it read, first dimension a multiple of ``examples`` and sorted by them.
        delta: The gradient of what it returned.
        examples: Examples in the call.
        count: How many of them are wanted.
        dtype: Wanted dtype: products of scaled gradients leave the range of half precision.

    Returns:
        The gradients; None if they cannot be told apart by example.
    """
    if len(inputs) % examples or len(delta) % examples or not len(inputs):
        return None
    module = layer.module
    inputs, delta = (t[: count * (len(t) // examples)].to(dtype) for t in (inputs, delta))
    if isinstance(module, nn.LayerNorm):
        if getattr(module, "data_format", "channels_last") == "channels_first":
            inputs, delta = inputs.movedim(1, -1), delta.movedim(1, -1)
        products = delta * F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        sums = [_by_example(t, count).sum(1) for t in (products, delta)]
        return Factors(None, torch.stack(sums[: layer.rows], dim=1))
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:  # depthwise
            gradient = _depthwise_gradient(module, inputs, delta).flatten(2)
            return Factors(None, _with_column(gradient, delta.sum((2, 3))[..., None], layer))
        windows = {name: getattr(module, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        inputs, delta = F.unfold(inputs, **windows).mT, delta.flatten(2).mT
    left, right = _by_example(delta, count), _by_example(inputs, count)
    return Factors(left, _with_column(right, right.new_ones(*right.shape[:2], 1), layer))


def _by_example(tensor: Tensor, examples: int) -> Tensor:
    return tensor.reshape(examples, -1, tensor.shape[-1])


def _with_column(rows: Tensor, column: Tensor, layer: Layer) -> Tensor:
    return torch.cat([rows, column], dim=-1) if len(layer.parameters) == 2 else rows


def _depthwise_gradient(module: nn.Conv2d, inputs: Tensor, delta: Tensor) -> Tensor:
    """Every example's gradient of a depthwise weight: each channel of the input convolved with its ``delta``."""
    stride, dilation, padding, kernel = module.stride, module.dilation, module.padding, module.kernel_size
    planes, kernels = inputs.reshape(1, -1, *inputs.shape[2:]), delta.reshape(-1, 1, *delta.shape[2:])
    # Stride and dilation change places: moving the window by one is one step of the kernel.
    out = F.conv2d(planes, kernels, stride=dilation, dilation=stride, padding=padding, groups=len(kernels))
    return out[..., : kernel[0], : kernel[1]].reshape(*inputs.shape[:2], *kernel)


@contextmanager
def recorded(
    layers: Sequence[Layer], examples: int, count: int, dtype: torch.dtype, arrived: Callable[[int, Factors], None]
) -> Iterator[None]:
    """A context for a forward whose backward will tell the gradients of its first examples.

    Args:
        layers: The layers.
        examples: Examples in the forward.
        count: How many of them are of interest.
        dtype: Dtype of what is told.
        arrived: Called in the backward, once for each call of a layer: its position and its gradients.
    """

    def gradient(position: int, inputs: Tensor, delta: Tensor) -> None:
        with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
            factors = factors_of(layers[position], inputs, delta, examples, count, dtype)
            if factors is not None:
                arrived(position, factors)

    def ran(position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            inputs = args[0] if args else next(iter(kwargs.values()))
            out.register_hook(partial(gradient, position, inputs.detach()))

    with ExitStack() as stack:
        for position, layer in enumerate(layers):
            # Before the hooks of others, which may replace the output.
            handle = layer.module.register_forward_hook(partial(ran, position), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield
