"""Slow, exact references that tests and ablations compare with: per-example gradients and the dense predictor.

Nothing here is meant for training: :func:`per_example_gradients` materialises one full gradient per example, and
:class:`DensePredictor` forms its basis and its ``(D + 1) D`` regressors explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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


class DensePredictor:
    """The dense linear low-rank predictor ``g_hat = U S phi`` with ``phi = [a; 1] (x) h``, after arXiv 2511.05187.

    ``U`` holds the leading right singular vectors of the fitted gradients (not centred: the prediction has no intercept), and
    ``S`` solves ridge regression of ``U^T g`` on ``phi`` in its primal form. With a basis that spans all fitted gradients, this is
    :class:`~hf_lgp.regression.KernelRidge` with the linear kernel.

    Args:
        rank: Number of basis vectors; None for as many as the gradients span.
        ridge: Regularisation relative to the mean of ``|phi_i|^2``, as in :class:`~hf_lgp.regression.KernelRidge`.

    Attributes:
        basis: ``U``, shape ``(P, r)``; None before :meth:`fit`.
        coefficients: ``S``, shape ``(r, (D + 1) D)``; None before :meth:`fit`.
    """

    def __init__(self, rank: int | None = None, ridge: float = 0.01) -> None:
        self.rank, self.ridge = rank, ridge
        self.basis: Tensor | None = None
        self.coefficients: Tensor | None = None

    def fit(self, features: Tensor, pullbacks: Tensor, gradients: Tensor) -> None:
        """Fit basis and coefficients.

        Args:
            features: ``a``, shape ``(n, D)``.
            pullbacks: ``h``, shape ``(n, D)``.
            gradients: Flat per-example gradients, shape ``(n, P)``.
        """
        phi = regressors(features, pullbacks)
        self.basis = torch.linalg.svd(gradients, full_matrices=False).Vh[: self.rank].T
        penalty = self.ridge * phi.square().sum(1).mean() * torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
        self.coefficients = torch.linalg.solve(phi.T @ phi + penalty, phi.T @ (gradients @ self.basis)).T

    def predict(self, features: Tensor, pullbacks: Tensor) -> Tensor:
        """Predicted gradients, shape ``(q, P)``, from features and pullbacks of shape ``(q, D)``."""
        if self.basis is None or self.coefficients is None:
            raise RuntimeError("DensePredictor.fit must be called before predictions are asked for.")
        return regressors(features, pullbacks) @ self.coefficients.T @ self.basis.T


def regressors(features: Tensor, pullbacks: Tensor) -> Tensor:
    """``phi_i = [a_i; 1] (x) h_i`` of every example, shape ``(n, (D + 1) D)``."""
    extended = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    return torch.einsum("ni,nj->nij", extended, pullbacks).flatten(1)
