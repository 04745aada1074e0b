"""Alignment of predicted and exact gradients, tracked prequentially and per tensor.

Every control example is predicted *before* it enters the window, so its exact and predicted coordinates give an honest
estimate of how well the next examples will be predicted, at no extra pass. From exponentially averaged centred second
moments follow the control-variate coefficient ``alpha`` and the squared correlation ``rho^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .estimator import optimal_alpha, squared_correlation


class Alignment:
    """Exponential averages of ``Var(g)``, ``Var(g_hat)`` and ``Cov(g, g_hat)``, one of each per tensor.

    Args:
        tensors: Number ``L`` of tensors.
        decay: Weight of the past; the average is bias-corrected, so the first batches count in full.
        device: Where the averages live; nothing here reads them back.
        dtype: Their dtype.
    """

    def __init__(
        self,
        tensors: int,
        decay: float = 0.9,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.decay = decay
        self._moments = torch.zeros(3, tensors, device=device, dtype=dtype)
        self._captured = torch.zeros(2, tensors, device=device, dtype=dtype)
        self._weight = torch.zeros((), device=device, dtype=dtype)
        self.batches = 0

    def update(self, variance: Tensor, predicted_variance: Tensor, covariance: Tensor) -> None:
        """Add one batch of control examples.

        Args:
            variance: Centred sum over examples of ``|C|^2``, per tensor, shape ``(L,)``.
            predicted_variance: The same of ``|C_hat|^2``, shape ``(L,)``.
            covariance: The same of ``<C, C_hat>``, shape ``(L,)``.

        A batch with non-finite entries is left out, on the device.
        """
        fresh = torch.stack([variance, predicted_variance, covariance]).to(self._moments)
        finite = fresh.isfinite().all()
        mixed = torch.lerp(fresh, self._moments, self.decay)
        self._moments = torch.where(finite, mixed, self._moments)
        self._weight = torch.where(finite, self.decay * self._weight + (1.0 - self.decay), self._weight)
        self.batches += 1

    def update_captured(self, kept: Tensor, total: Tensor) -> None:
        """Add one batch of captured energies: centred, inside the bases (``kept``) and in all (``total``), shape ``(L,)``."""
        fresh = torch.stack([kept, total]).to(self._captured)
        # Few batches are measured (when bases move), so the past counts for less than in the moments.
        mixed = torch.lerp(fresh, self._captured, 0.5)
        self._captured = torch.where(fresh.isfinite().all(), mixed, self._captured)

    @property
    def captured(self) -> Tensor:
        """Share of the centred gradient energy inside the bases, per tensor, shape ``(L,)``; 1 before it was measured."""
        kept, total = self._captured
        return torch.where(
            total > 0, kept / total.clamp(min=torch.finfo(total.dtype).tiny), torch.ones_like(total)
        ).clamp(0, 1)

    @property
    def moments(self) -> Tensor:
        """Bias-corrected averages ``(Var(C), Var(C_hat), Cov(C, C_hat))``, shape ``(3, L)``; zero before the first batch."""
        return self._moments / self._weight.clamp(min=torch.finfo(self._weight.dtype).tiny)

    @property
    def alpha(self) -> Tensor:
        """Control-variate coefficients, shape ``(L,)``; 0 before the first batch."""
        _, predicted_variance, covariance = self._moments
        return optimal_alpha(covariance, predicted_variance)

    @property
    def rho2(self) -> Tensor:
        """Squared correlations with the *whole* gradient, shape ``(L,)``: those of the coordinates times :attr:`captured`."""
        variance, predicted_variance, covariance = self._moments
        return squared_correlation(covariance, variance, predicted_variance) * self.captured

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return {
            "moments": self._moments,
            "captured": self._captured,
            "weight": self._weight,
            "batches": torch.tensor(self.batches),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the number of tensors differs.
        """
        if state["moments"].shape != self._moments.shape:
            raise ValueError("The stored alignment belongs to another number of tensors.")
        self._moments = state["moments"].to(self._moments, copy=True)
        self._captured = state["captured"].to(self._captured, copy=True)
        self._weight = state["weight"].to(self._weight, copy=True)
        self.batches = int(state["batches"])
