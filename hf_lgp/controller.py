"""The controller: which control fraction now, when to refit, when to move the bases.

It counts observed micro-batches and decides from counts alone, so it never waits for the device and every process of a
distributed run takes the same branch.
"""

from __future__ import annotations

from .settings import LGPSettings

_EAGER_BASIS_STEPS = 8
"""The first bases are random: they move at every one of so many micro-batches, until they point somewhere."""


class Controller:
    """Decisions of one training run.

    Args:
        settings: The method's settings.

    Attributes:
        observed: Micro-batches observed so far.
    """

    def __init__(self, settings: LGPSettings) -> None:
        self.settings = settings
        self.observed = 0
        self._since_fit = 0

    def fraction(self, ready: bool) -> float:
        """Control fraction of the next micro-batch: 1 until the predictor is ready."""
        return self.settings.control_fraction if ready else 1.0

    @property
    def moves_bases(self) -> bool:
        """Whether the micro-batch being observed contributes to the bases."""
        return self.observed < _EAGER_BASIS_STEPS or self.observed % self.settings.basis_steps == 0

    def refit_due(self, remembered: int, fitted: bool, queue_full: bool) -> bool:
        """Whether to refit after the micro-batch just observed.

        Args:
            remembered: Exact examples at hand.
            fitted: Whether there is a fit already.
            queue_full: Whether the queue has no room for another micro-batch.
        """
        if not fitted:
            return remembered >= self.settings.warmup_examples
        return queue_full or self._since_fit >= self.settings.refit_steps

    def advance(self) -> None:
        """Count one observed micro-batch."""
        self.observed += 1
        self._since_fit += 1

    def refitted(self) -> None:
        """Note that the regression was just fitted."""
        self._since_fit = 0

    def state_dict(self) -> dict[str, int]:
        """Counters by name."""
        return {"observed": self.observed, "since_fit": self._since_fit}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.observed, self._since_fit = state["observed"], state["since_fit"]
