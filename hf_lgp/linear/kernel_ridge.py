"""Kernel ridge regression from features and last-layer gradients to gradient coordinates, in its dual form.

An example enters through its features ``a`` and ``h = dl/da``. Its trunk gradient is ``J^T h`` with ``J = da/dtheta``: linear in ``h``, and ``J`` varies slowly
with ``a``. A ridge regression on ``[a; 1] (x) h`` (the idea of arXiv 2511.05187) never needs that long vector: in the dual it needs only

    linear:  k(i, j) = (1 + <a_i, a_j>) <h_i, h_j>                                                        (4)
    rbf:     k(i, j) = exp(-|a_i - a_j|^2 / (2 D s^2)) <h_i, h_j>,   s^2 the mean variance of the features     (5)

Both are linear in ``h``, so a prediction scales with the loss as the gradient does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """A fitted regression on ``n`` examples: ``(a - centre) * scale (n, D)``, ``h (n, D)`` and ``(K + lambda I)^-1 C (n, P)`` for targets ``C``.

    For (5) the centre is the features' mean and the scale ``1 / (s sqrt(D))``; for (4) they are zeros and one.
    """

    features: Tensor
    pulled: Tensor
    dual: Tensor
    centre: Tensor
    scale: Tensor


def features_of(outputs: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features ``(m, D)`` and last-layer gradients ``(m, D)`` of ``m`` examples, each a function of that example alone.

    They come from those tensors of the trunk's output that are read, ``(m, D)``, ``(m, T, D)`` or ``(m, D, height, width)``, side by side. A vector is its
    own feature. Of rows, ``h`` is the sum of their gradients and ``a`` their mean weighted by the gradients' norms: the class token's row
    where only that is read, the mean where rows are averaged.
    """
    features, pulled = [], []
    for out, delta in zip(outputs, deltas, strict=True):
        a, h = out.to(dtype), delta.to(dtype)
        if a.dim() != 3:  # as rows (m, T, D)
            a, h = (t.flatten(2).mT if t.dim() > 3 else t.reshape(len(t), 1, -1) for t in (a, h))
        norms = h.norm(dim=-1)
        shares = norms / norms.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        features.append((shares[:, None] @ a)[:, 0])
        pulled.append(h.sum(1))
    return torch.cat(features, 1), torch.cat(pulled, 1)


def _kernel_matrix(kernel: str, a: Tensor, h: Tensor, others: Tensor, others_h: Tensor) -> Tensor:
    """(4) or (5) between ``q`` and ``n`` examples with scaled features; shape ``(q, n)``."""
    similarity = a @ others.T
    if kernel == "linear":
        similarity = similarity + 1.0
    else:
        squares = a.square().sum(1)[:, None] + others.square().sum(1)
        similarity = (similarity - squares / 2.0).clamp(max=0.0).exp()
    return similarity * (h @ others_h.T)


def fit(kernel: str, ridge: float, features: Tensor, pulled: Tensor, targets: Tensor) -> Fit:
    """Fit the regression on ``a (n, D)``, ``h (n, D)`` and targets ``C (n, P)``.

    The penalty is ``lambda = ridge * mean_i k(i, i)``, so that it does not depend on any scale. A kernel matrix that cannot
    be factorised gives a fit that predicts zeros: no device is stalled by looking.
    """
    centre, scale = torch.zeros_like(features[0]), features.new_ones(())
    if kernel == "rbf":
        # One scale for all features: those that vary more tell more.
        spread = features.var(0, unbiased=False).sum()
        centre, scale = features.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread)).rsqrt()
    features = (features - centre) * scale
    gram = _kernel_matrix(kernel, features, pulled, features, pulled)
    penalty = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(penalty.expand(len(gram))))
    # One memory layout, whatever the solver returns: rounding depends on it, and a resumed run must round alike.
    dual = torch.cholesky_solve(targets, factor).contiguous()
    healthy = (failed == 0) & dual.isfinite().all()
    return Fit(features, pulled.clone(), torch.where(healthy, dual, torch.zeros_like(dual)), centre, scale)


def predict(kernel: str, fitted: Fit, features: Tensor, pulled: Tensor, weights: Tensor) -> Tensor:
    """Coordinates, shape ``(P,)``, predicted for a weighted sum of ``q`` examples: ``a (q, D)``, ``h (q, D)``, ``w (q,)``."""
    features = (features - fitted.centre) * fitted.scale
    # Summing before the large product makes its cost that of one example.
    return weights @ _kernel_matrix(kernel, features, pulled, fitted.features, fitted.pulled) @ fitted.dual
