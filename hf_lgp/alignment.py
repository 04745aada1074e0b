"""Alignment of predicted and exact gradients, tracked prequentially and per tensor.

A prediction has two parts, the class path ``p`` and the ridge regression ``r`` on what the path leaves over,
``g - beta p``. Every control example is predicted *before* it enters the window, so its exact and predicted coordinates
give an honest estimate of how well the next examples will be predicted, at no extra pass. From exponentially averaged
centred second moments follow ``beta``, the control-variate coefficients of both parts (one regression of ``g`` on ``p``
and ``r``), and the share of the gradient's variance that predictions explain.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTS = ("gg", "gp", "gr", "pp", "pr", "rr")
"""Centred second moments of exact gradient ``g``, path ``p`` and ridge ``r``, in the order in which they are kept."""

_LARGEST = 2.0
"""Coefficients beyond this are noise: path and ridge are gradients in the gradient's own units."""

_COLLINEAR = 1e-3
"""Relative ridge of the two-by-two regression: path and ridge may become nearly collinear."""


class Alignment:
    """Exponential averages of centred second moments of ``g``, ``p`` and ``r``, one of each per tensor.

    Args:
        tensors: Number ``L`` of tensors.
        decay: Weight of the past; the average is bias-corrected, so the first batches count in full.
        device: Where the averages live; nothing here reads them back.
        dtype: Their dtype.
    """

    def __init__(
        self,
        tensors: int,
        decay: float = 0.8,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.decay = decay
        self._moments = torch.zeros(len(MOMENTS), tensors, device=device, dtype=dtype)
        self._energies = torch.zeros(4, tensors, device=device, dtype=dtype)
        self._weight = torch.zeros((), device=device, dtype=dtype)
        self.batches = 0

    def update(self, moments: Tensor) -> None:
        """Add one batch of control examples.

        Args:
            moments: Centred sums over examples in the order of :data:`MOMENTS`, per tensor, shape ``(6, L)``.

        A batch with non-finite entries is left out, on the device.
        """
        fresh = moments.to(self._moments)
        finite = fresh.isfinite().all()
        mixed = torch.lerp(fresh, self._moments, self.decay)
        self._moments = torch.where(finite, mixed, self._moments)
        self._weight = torch.where(finite, self.decay * self._weight + (1.0 - self.decay), self._weight)
        self.batches += 1

    def update_energies(self, error: Tensor, total: Tensor, kept: Tensor, remainder: Tensor) -> None:
        """Add one batch of centred energies of *whole* gradients, outside of the bases too, shape ``(L,)`` each.

        Args:
            error: Of what predictions left unexplained.
            total: Of the exact gradients.
            kept: Of the remainder ``g - beta p`` inside the bases.
            remainder: Of the whole remainder.
        """
        fresh = torch.stack([error, total, kept, remainder]).to(self._energies)
        # Few batches are measured (when bases move), so the past counts for less than in the moments.
        mixed = torch.lerp(fresh, self._energies, 0.5)
        self._energies = torch.where(fresh.isfinite().all(), mixed, self._energies)

    @property
    def captured(self) -> Tensor:
        """Share of the remainder's energy inside the bases, per tensor, shape ``(L,)``; 1 before it was measured."""
        return _share(self._energies[2], self._energies[3])

    @property
    def rho2(self) -> Tensor:
        """Share of the whole gradient's variance that predictions explain, shape ``(L,)``; 0 before it was measured.

        At optimal coefficients this is the squared correlation of exact and predicted gradients; with the coefficients
        actually used it is never more.
        """
        return 1.0 - _share(self._energies[0], self._energies[1])

    @property
    def path_rho2(self) -> Tensor:
        """Share that the path alone would explain, with its own coefficient ``beta``, shape ``(L,)``."""
        return 1.0 - _share(self._energies[3], self._energies[1])

    @property
    def variance(self) -> Tensor:
        """Centred energy of the whole gradient, in units common to all tensors, shape ``(L,)``."""
        return self._energies[1]

    @property
    def moments(self) -> Tensor:
        """Bias-corrected averages in the order of :data:`MOMENTS`, shape ``(6, L)``; zero before the first batch."""
        return self._moments / self._weight.clamp(min=torch.finfo(self._weight.dtype).tiny)

    @property
    def beta(self) -> Tensor:
        """Coefficient of the path in what the ridge regression is fitted to, shape ``(L,)``; 1 before it was measured."""
        _, gp, _, pp, _, _ = self._moments
        return _quotient(gp, pp, 1.0).clamp(0.0, _LARGEST)

    @property
    def path_coefficient(self) -> Tensor:
        """Control-variate coefficient of the path alone, shape ``(L,)``; 0 before the first batch."""
        _, gp, _, pp, _, _ = self._moments
        return _quotient(gp, pp, 0.0).clamp(0.0, _LARGEST)

    @property
    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Control-variate coefficients of path and ridge, shape ``(L,)`` each; 0 before the first batch.

        The least-squares solution in ``Var(g - a_p p - a_r r)``, each clipped to [0, 2]; where one part is absent, the
        other's own.
        """
        _, gp, gr, pp, pr, rr = self._moments
        # Normalised to unit variances first: products of tiny variances underflow in float32.
        root_p, root_r = _quotient(torch.ones_like(pp), pp.sqrt(), 0.0), _quotient(torch.ones_like(rr), rr.sqrt(), 0.0)
        on_p, on_r, between = gp * root_p, gr * root_r, (pr * root_p * root_r).clamp(-1.0, 1.0)
        own = 1.0 + _COLLINEAR
        determinant = own * own - between.square()
        path = (own * on_p - between * on_r) / determinant * root_p
        ridge = (own * on_r - between * on_p) / determinant * root_r
        return path.clamp(0.0, _LARGEST), ridge.clamp(0.0, _LARGEST)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return {
            "moments": self._moments,
            "energies": self._energies,
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
        self._energies = state["energies"].to(self._energies, copy=True)
        self._weight = state["weight"].to(self._weight, copy=True)
        self.batches = int(state["batches"])


def _quotient(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    """``numerator / denominator``, and ``otherwise`` where the denominator vanishes."""
    some = denominator > 0
    quotient = numerator / torch.where(some, denominator, torch.ones_like(denominator))
    return torch.where(some, quotient, torch.full_like(quotient, otherwise))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return _quotient(part, whole, 1.0).clamp(0.0, 1.0)
