"""Kernel ridge regression from features and last-layer gradients to gradient coordinates, in its dual form.

An example enters through its features ``a`` and ``h = dl/da``. Its trunk gradient is ``J^T h`` with ``J = da/dtheta``: linear in ``h``, and ``J`` varies slowly
with ``a``. A ridge regression on ``[a; 1] (x) h`` (the idea of arXiv 2511.05187) never needs that long vector: in the dual it needs only

    linear:  k(i, j) = (1 + <a_i, a_j>) <h_i, h_j>                                                        (4)
    rbf:     k(i, j) = exp(-|a_i - a_j|^2 / (2 D s^2)) <h_i, h_j>,   s^2 the mean variance of the features     (5)

Both are linear in ``h``, so a prediction scales with the loss as the gradient does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]
KERNELS: tuple[str, ...] = get_args(Kernel)


@dataclass(frozen=True)
class Fit:
    """A fitted regression on ``n`` examples.

    Attributes:
        kernel: Which kernel it uses.
        features: ``a``, shape ``(n, D)``, standardised where the kernel asks for it.
        pulled: ``h``, shape ``(n, D)``.
        dual: ``(K + lambda I)^-1 C`` for targets ``C``, shape ``(n, P)``.
        centre: Mean of the features, shape ``(D,)``; zeros for the linear kernel.
        scale: What features are multiplied by, shape ``()``; one for the linear kernel.
    """

    kernel: Kernel
    features: Tensor
    pulled: Tensor
    dual: Tensor
    centre: Tensor
    scale: Tensor


def kernel_matrix(kernel: Kernel, features: Tensor, pulled: Tensor, others: Tensor, others_pulled: Tensor) -> Tensor:
    """The kernel between ``q`` and ``n`` examples, (4) or (5) with standardised features; shape ``(q, n)``.

    Args:
        kernel: Which one.
        features: ``a`` of the first, shape ``(q, D)``.
        pulled: ``h`` of the first, shape ``(q, D)``.
        others: ``a`` of the second, shape ``(n, D)``.
        others_pulled: ``h`` of the second, shape ``(n, D)``.

    Raises:
        ValueError: If the kernel is unknown.
    """
    products = features @ others.T
    if kernel == "linear":
        similarity = products + 1.0
    elif kernel == "rbf":
        squares = features.square().sum(1)[:, None] + others.square().sum(1)[None, :]
        similarity = ((2.0 * products - squares).clamp(max=0.0) / (2.0 * features.shape[1])).exp()
    else:
        raise ValueError(f"Unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}.")
    return similarity * (pulled @ others_pulled.T)


def fit(features: Tensor, pulled: Tensor, targets: Tensor, kernel: Kernel = "linear", ridge: float = 0.03) -> Fit:
    """Fit the regression.

    Args:
        features: ``a``, shape ``(n, D)``.
        pulled: ``h``, shape ``(n, D)``.
        targets: ``C``, shape ``(n, P)``.
        kernel: Which kernel.
        ridge: Penalty relative to the kernel's mean diagonal, ``lambda = ridge * mean_i k(i, i)``, so that its meaning does not depend on any scale.

    Returns:
        The fit. It predicts zeros if the kernel matrix cannot be factorised: no device is stalled by looking.

    Raises:
        ValueError: If the kernel is unknown or ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"The ridge must be positive, got {ridge}.")
    centre, scale = torch.zeros_like(features[0]), features.new_ones(())
    if kernel == "rbf":
        # One scale for all features: those that vary more tell more.
        variance = features.var(0, unbiased=False).mean()
        centre, scale = features.mean(0), torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
    features = (features - centre) * scale
    gram = kernel_matrix(kernel, features, pulled, features, pulled)
    penalty = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(penalty.expand(len(gram))))
    # One memory layout, whatever the solver returns: rounding depends on it, and a resumed run must round alike.
    dual = torch.cholesky_solve(targets, factor).contiguous()
    healthy = (failed == 0) & dual.isfinite().all()
    return Fit(kernel, features, pulled.clone(), torch.where(healthy, dual, torch.zeros_like(dual)), centre, scale)


def predict(fitted: Fit, features: Tensor, pulled: Tensor, weights: Tensor | None = None) -> Tensor:
    """Predicted coordinates of ``q`` examples, or of a weighted sum of them.

    Args:
        fitted: The regression.
        features: ``a``, shape ``(q, D)``.
        pulled: ``h``, shape ``(q, D)``.
        weights: Weights of the sum, shape ``(q,)``; None for every example by itself.

    Returns:
        Shape ``(q, P)``, or ``(P,)`` for a sum.
    """
    features = (features - fitted.centre) * fitted.scale
    rows = kernel_matrix(fitted.kernel, features, pulled, fitted.features, fitted.pulled)
    # Summing before the large product makes its cost that of one example.
    return (rows if weights is None else weights @ rows) @ fitted.dual
