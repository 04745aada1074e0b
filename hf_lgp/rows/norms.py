"""Layer norms of followed rows: a mean of rows gets the scale that the norm gave its rows.

A mean is shorter than the rows it stands for, so its own norm would stretch it and its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def noted_norm(norm: nn.LayerNorm, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A layer norm's output of rows ``(m, T, D)``, and the scale ``1 / sigma`` of each, ``(m, T, 1)``, without a graph."""
    if rows.dtype.itemsize < 4 and torch.is_autocast_enabled(rows.device.type):  # whose dtype for the output is its own
        scale = torch.native_layer_norm(rows.detach().float(), norm.normalized_shape, None, None, norm.eps)[2]
        return F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps), scale
    out, _, scale = torch.native_layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return out, scale.detach()


def norm_of_means(norm: nn.LayerNorm, rows: Tensor, scale: Tensor) -> Tensor:
    """The layer norm of mean rows ``(m, S, D)`` at ``scale (m, S, 1)``, the weighted mean of ``1 / sigma`` of the rows they stand for."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (norm.weight, norm.bias))
    normal, _, own = torch.native_layer_norm(wide, norm.normalized_shape, weight, None, norm.eps)
    ratio = scale / own.detach()
    return (normal * ratio if bias is None else torch.addcmul(bias, normal, ratio)).to(rows.dtype)
