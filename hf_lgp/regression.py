"""Kernel ridge regression from last-layer quantities to gradient coordinates, in its dual form.

An example enters through its head input ``a`` (features) and ``h = dl/da`` (the residual pulled back through the
head). Its trunk gradient is ``J^T h`` with ``J = da/dtheta``: linear in ``h``, and by the NTK view ``J`` varies slowly and
smoothly with ``a``. Regressing on ``[a; 1] (x) h`` (arXiv 2511.05187) is, in the dual, kernel ridge regression with::

    linear:  k(i, j) = (1 + <a_i, a_j>) <h_i, h_j>                                                    (5)
    rbf:     k(i, j) = exp(-|a~_i - a~_j|^2 / (2 D)) <h_i, h_j>,   a~ = (a - mean) / std over the window (6)

Both are linear in ``h``. ``J`` drifts as training goes on, so either kernel is multiplied by ``exp(-|t_i - t_j|)`` where the times at
which examples were seen are known, in units of the predictor's memory. A prediction is ``w @ C`` with the window's coordinates ``C`` and ``w = k (K + lambda I)^-1``; the
regression itself never touches ``C``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]
KERNELS: tuple[str, ...] = get_args(Kernel)


class KernelRidge:
    """Dual weights of kernel ridge regression over a window of ``n`` examples.

    Args:
        kernel: ``"linear"`` for (5) or ``"rbf"`` for (6).
        ridge: Regularisation relative to the kernel's mean diagonal: ``lambda = ridge * mean_i k(i, i)``, so that its
            meaning does not depend on the scale of the loss.

    Raises:
        ValueError: If the kernel is unknown or ``ridge`` is not positive.
    """

    def __init__(self, kernel: Kernel = "rbf", ridge: float = 0.03) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"Unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}.")
        if not ridge > 0:
            raise ValueError(f"The ridge must be positive, got {ridge}.")
        self.kernel: Kernel = kernel
        self.ridge = ridge
        self._features: Tensor | None = None
        self._pullbacks: Tensor | None = None
        self._centre: Tensor | None = None
        self._scale: Tensor | None = None
        self._fading: Tensor | None = None
        self._factor: Tensor | None = None

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has been called."""
        return self._factor is not None

    def fit(self, features: Tensor, pullbacks: Tensor, ages: Tensor | None = None) -> None:
        """Factorise the kernel matrix of the window.

        Args:
            features: ``a``, shape ``(n, D)``, floating point.
            pullbacks: ``h``, shape ``(n, D)``.
            ages: How long ago the examples were seen, in units of the memory, shape ``(n,)``; None for all at once.

        A kernel matrix that cannot be factorised yields NaN weights rather than an error, so that no device is stalled
        by looking; callers gate non-finite predictions.
        """
        self._centre = features.mean(0)
        # One scale for all features: those that vary more tell more. (Scaling each to unit variance predicts a little worse.)
        variance = features.var(0, unbiased=False).mean()
        self._scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
        self._features = self._standardise(features)
        self._pullbacks = pullbacks.clone()
        self._fading = None
        gram = self.cross_kernel(features, pullbacks)
        if ages is not None:
            gram = gram * (-(ages[:, None] - ages[None, :]).abs()).exp()
            self._fading = (-ages).exp()
        diagonal = gram.diagonal()
        penalty = (self.ridge * diagonal.mean()).clamp(min=torch.finfo(gram.dtype).tiny)
        gram = gram + torch.diag_embed(penalty.expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(gram)
        self._factor = torch.where(failed == 0, factor, torch.full_like(factor, torch.nan))

    def _standardise(self, features: Tensor) -> Tensor:
        if self.kernel == "linear":
            return features.clone()
        assert self._centre is not None and self._scale is not None
        return (features - self._centre) * self._scale

    def cross_kernel(self, features: Tensor, pullbacks: Tensor) -> Tensor:
        """Kernel between new examples, of age 0, and the fitted window, shape ``(q, n)``.

        Args:
            features: ``a`` of the new examples, shape ``(q, D)``.
            pullbacks: ``h`` of the new examples, shape ``(q, D)``.
        """
        if self._features is None or self._pullbacks is None:
            raise RuntimeError("KernelRidge.fit must be called before predictions are asked for.")
        query, window = self._standardise(features), self._features
        products = query @ window.T
        if self.kernel == "linear":
            similarity = products + 1.0
        else:
            squares = query.square().sum(1)[:, None] + window.square().sum(1)[None, :]
            similarity = ((2.0 * products - squares).clamp(max=0.0) / (2.0 * query.shape[1])).exp()
        if self._fading is not None:
            similarity = similarity * self._fading
        return similarity * (pullbacks @ self._pullbacks.T)

    def weights(self, kernel_rows: Tensor) -> Tensor:
        """Dual weights of predictions: ``w = k (K + lambda I)^-1``.

        Args:
            kernel_rows: Rows of :meth:`cross_kernel` or any linear combination of them, shape ``(q, n)``.

        Returns:
            Weights, shape ``(q, n)``: the prediction is ``weights @ C``, with ``C`` the targets of the window.
        """
        if self._factor is None:
            raise RuntimeError("KernelRidge.fit must be called before predictions are asked for.")
        return torch.cholesky_solve(kernel_rows.T, self._factor).T
