"""Weights of an attention block as products without a graph take them: in their dtype, the first norm folded in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_block import AttentionBlock

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


def _onednn_linear() -> Callable[..., Tensor] | None:
    """OneDNN's linear layer in bfloat16, which compiled models use on a CPU; None where torch or the processor lacks it."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    supported = known and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._linear_pointwise if supported else None


_LINEAR = _onednn_linear()


def affine(rows: Tensor, layer: Affine) -> Tensor:
    """``rows W^T + b`` without a graph, shapes ``(..., in)`` and ``(..., out)``.

    In bfloat16 on a CPU, ``F.linear`` spreads the bias over the result before it multiplies, a quarter of the layer's time.
    """
    weight, bias = layer
    if _LINEAR is None or bias is None or rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return F.linear(rows, weight, bias)
    product: Tensor = _LINEAR(rows, weight, bias, "none", [], "")
    return product


class BlockWeights:
    """Weights of a block for one step: the optimizer changes them.

    The affine map of the norm before the attention is folded into queries, keys and values, the scores' factor into the queries,
    so that one normalisation serves the block and the class-token path.

    Args:
        block: The block.
        dtype: Dtype of its products.

    Attributes:
        query: Weight and bias of the queries' layer, of rows that are normalised without affine map.
        key: The same of the keys.
        value: The same of the values.
        together: The three as one layer.
        output: Weight and bias of the output projection.
        expand: The same of the first MLP layer.
        contract: The same of the second.
    """

    @torch.no_grad()
    def __init__(self, block: AttentionBlock, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype
        norm, layers = block.norm_before, (block.query, block.key, block.value)
        with torch.autocast(norm.weight.device.type, enabled=False):
            wide = torch.promote_types(torch.promote_types(block.query.weight.dtype, norm.weight.dtype), torch.float32)
            weight = torch.cat([layer.weight for layer in layers]).to(wide)
            bias = torch.cat([_bias(layer) for layer in layers]).to(wide).addmv_(weight, norm.bias.to(wide))
            weight = weight.mul_(norm.weight)
            widths = [layer.out_features for layer in layers]
            for part in (weight, bias):
                part[: widths[0]].mul_(block.scaling)
            self.together = weight.to(dtype), bias.to(dtype)
            parts = zip(*(part.split(widths) for part in self.together), strict=True)
            self.query, self.key, self.value = parts
            self.output, self.expand, self.contract = (
                self._cast(layer) for layer in (block.output, block.expand, block.contract)
            )

    def _cast(self, layer: nn.Linear) -> Affine:
        return layer.weight.to(self.dtype), None if layer.bias is None else layer.bias.to(self.dtype)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
