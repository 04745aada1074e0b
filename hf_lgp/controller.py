"""The controller: which control fraction now, when to observe, when to refit, when to move the bases.

It counts micro-batches and decides from counts alone, so it never waits for the device and every process of a
distributed run takes the same branch.
"""

from __future__ import annotations

from .settings import LGPSettings

_EAGER_BASIS_STEPS = 8
"""The first bases are random: they move at every one of so many micro-batches, until they point somewhere."""

_MEASURING_STEPS = 4
"""Predictions are compared with exact gradients at every so many micro-batches: coefficients change slowly."""


class Controller:
    """Decisions of one training run.

    Args:
        settings: The method's settings.

    Attributes:
        seen: Micro-batches so far.
    """

    def __init__(self, settings: LGPSettings) -> None:
        self.settings = settings
        self.seen = 0
        self._since_fit = 0

    def fraction(self, ready: bool) -> float:
        """Control fraction of the next micro-batch: 1 until the predictor is ready."""
        return self.settings.control_fraction if ready else 1.0

    def observes(self, ready: bool) -> bool:
        """Whether the predictor takes examples from this micro-batch."""
        return self.measures(ready) or self.seen % self.settings.observe_steps == 0

    @property
    def moves_bases(self) -> bool:
        """Whether this micro-batch contributes to the bases."""
        return self.seen < _EAGER_BASIS_STEPS or self.seen % self.settings.basis_steps == 0

    def measures(self, ready: bool) -> bool:
        """Whether to compare predictions with the the exact gradients of this micro-batch."""
        return not ready or self.moves_bases or self.seen % _MEASURING_STEPS == 0

    def refit_due(self, remembered: int, fitted: bool, queue_full: bool) -> bool:
        """Whether to refit after this micro-batch.

        Args:
            remembered: Exact examples at hand.
            fitted: Whether there is a fit already.
            queue_full: Whether the queue has no room for another micro-batch.
        """
        if not fitted:
            return remembered >= self.settings.warmup_examples
        return queue_full or self._since_fit >= self.settings.refit_steps

    def advance(self) -> None:
        """Count one micro-batch."""
        self.seen += 1
        self._since_fit += 1

    def refitted(self) -> None:
        """Note that the regression was just fitted."""
        self._since_fit = 0

    def state_dict(self) -> dict[str, int]:
        """Counters by name."""
        return {"seen": self.seen, "since_fit": self._since_fit}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.seen, self._since_fit = state["seen"], state["since_fit"]
