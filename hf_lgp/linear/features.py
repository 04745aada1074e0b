"""What the paper's predictor knows of an example: features ``a`` and last-layer gradient ``h``, from a trunk's output and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def features_of(outputs: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and last-layer gradients of ``m`` examples, each a function of that example alone.

    A vector is its own feature. Of rows, ``h`` is the sum of their gradients and ``a`` their mean weighted by the gradients' norms: the
    class token's row where only that is read, the mean where rows are averaged.

    Args:
        outputs: Those tensors of the trunk's output that are read: ``(m, D)``, ``(m, T, D)`` or ``(m, D, height, width)``.
        deltas: Their gradients.
        dtype: Wanted dtype.

    Returns:
        Two tensors of shape ``(m, D)``, with several outputs side by side.
    """
    features, pulled = [], []
    for out, delta in zip(outputs, deltas, strict=True):
        a, h = out.to(dtype), delta.to(dtype)
        if a.dim() == 1:
            a, h = a[:, None], h[:, None]
        if a.dim() > 3:
            a, h = a.flatten(2).mT, h.flatten(2).mT
        if a.dim() == 3:
            norms = h.norm(dim=-1)
            shares = norms / norms.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            a, h = (shares[:, None] @ a)[:, 0], h.sum(1)
        features.append(a)
        pulled.append(h)
    return torch.cat(features, 1), torch.cat(pulled, 1)
