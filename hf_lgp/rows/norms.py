"""Norms of followed rows: a mean of rows gets the scale that the norm gave its rows.

A mean is shorter than the rows it stands for, so its own norm would stretch it and its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A module that divides each row by its size: ``centred``, after its mean was taken off, or not."""

    module: nn.Module
    centred: bool


def is_layer_norm(module: nn.Module | None) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is PyTorch's layer norm; a subclass may do something else."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def norm_of(module: nn.Module, rows: Any) -> Norm | None:
    """A module as a norm, if that is what it does to such rows ``(m, T, D)``: the same to rows and to their multiples."""
    if is_layer_norm(module):
        return Norm(module, True)
    if not isinstance(rows, Tensor) or rows.dim() != 3 or next(module.children(), None) is not None:
        return None
    weights = list(module.parameters())
    if not weights or any(p.shape != rows.shape[-1:] for p in weights):
        return None
    try:
        with torch.no_grad():
            out, of_twice, of_moved = (type(module).forward(module, each) for each in (rows, 2.0 * rows, rows + 1.0))
    except Exception:  # it wants more than rows
        return None
    if not isinstance(out, Tensor) or out.shape != rows.shape:
        return None
    size = 1e-2 * out.norm()
    same = bool((of_twice - out).norm() <= size) and bool((out - rows).norm() > size)
    return Norm(module, bool((of_moved - out).norm() <= size)) if same else None


def noted_norm(norm: Norm, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's output of rows ``(m, T, D)``, and the scale ``1 / sigma`` of each, ``(m, T, 1)``, without a graph."""
    module = norm.module
    if not is_layer_norm(module):
        return type(module).forward(module, rows), _scale(norm, rows.detach())
    if rows.dtype.itemsize < 4 and torch.is_autocast_enabled(rows.device.type):  # whose dtype for the output is its own
        scale = torch.native_layer_norm(rows.detach().float(), module.normalized_shape, None, None, module.eps)[2]
        return F.layer_norm(rows, module.normalized_shape, module.weight, module.bias, module.eps), scale
    # CUDA knows no norm of rows with weights of another type.
    dtype = rows.dtype if module.weight is None else torch.promote_types(rows.dtype, module.weight.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (module.weight, module.bias))
    out, _, scale = torch.native_layer_norm(rows.to(dtype), module.normalized_shape, weight, bias, module.eps)
    return out.to(rows.dtype), scale.detach()


def norm_of_means(norm: Norm, rows: Tensor, scale: Tensor) -> Tensor:
    """The norm of mean rows ``(m, S, D)`` at ``scale (m, S, 1)``, the weighted mean of ``1 / sigma`` of the rows they stand for."""
    module = norm.module
    if not is_layer_norm(module):
        out, bias = type(module).forward(module, rows), getattr(module, "bias", None)
        ratio = (scale / _scale(norm, rows.detach())).to(out.dtype)
        return out * ratio if bias is None else (out - bias) * ratio + bias
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (module.weight, module.bias))
    normal, _, own = torch.native_layer_norm(wide, module.normalized_shape, weight, None, module.eps)
    ratio = scale / own.detach()
    return (normal * ratio if bias is None else torch.addcmul(bias, normal, ratio)).to(rows.dtype)


def _scale(norm: Norm, rows: Tensor) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if norm.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    eps = next((getattr(norm.module, n) for n in ("eps", "variance_epsilon") if hasattr(norm.module, n)), None)
    return (wide.square().mean(-1, keepdim=True) + (1e-6 if eps is None else eps)).rsqrt()
