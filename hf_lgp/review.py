"""The review: times every micro-batch and lets the controller choose a plan from what was measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .alignment import Alignment
from .controller import Controller
from .exchange import Exchange
from .plans import EXACT, Explained, Plan
from .stopwatch import Stopwatch

_IDEAL_PREDICTION = 1.0 / 3.0
"""A forward pass in units of a forward and backward pass, by operation count."""


class Review:
    """Readings for the controller, the same on all processes.

    Args:
        controller: Takes the readings.
        alignment: Tells how well gradients are predicted.
        weights: Share of every tensor in the trunk's parameters, and below it, row by row, its share in those of each part of the
            trunk, shape ``(1 + parts, L)``. Adam gives each entry about the same step, so a tensor's noise counts as many times as it has
            entries.
        exchange: Averages readings over processes.
        device: Where the work is done.

    Attributes:
        reviews: Number of reviews so far.
    """

    def __init__(
        self, controller: Controller, alignment: Alignment, weights: Tensor, exchange: Exchange, device: torch.device
    ) -> None:
        self.controller, self.alignment, self.weights, self.exchange = controller, alignment, weights, exchange
        self.device = device
        self.stopwatch = Stopwatch(device)
        self.reviews = 0
        self._label: tuple[Plan, int] | None = None
        self._staged: tuple[list[tuple[Plan, int]], Tensor, Any] | None = None

    def now(self) -> None:
        """Review with all that was measured, out of turn; on a GPU this waits for it. Nothing to do at a fixed fraction."""
        if not self.controller.automatic:
            return
        for _ in range(2 if self.device.type == "cuda" else 1):  # what is staged is read by the next review
            self._review()

    def begin(self, ready: bool, examples: int, size: int) -> None:
        """Begin a micro-batch of ``examples`` examples and ``size`` units of work, with a review if one is due."""
        if not self.controller.automatic:
            return
        if self.controller.review_due(ready):
            self._review()
        plan = self.controller.label(ready, examples)
        self._label = None if plan is None else (plan, size)
        self.stopwatch.start()

    def end(self) -> None:
        """End the micro-batch."""
        if self._label is not None:
            self.stopwatch.stop(self._label, self._label[1])

    def _review(self) -> None:
        taken = self.stopwatch.collect()
        seconds = torch.tensor([s for _, s in taken], dtype=torch.float64).to(self.device, non_blocking=True)
        shares = torch.stack([self.alignment.path_rho2, self.alignment.rho2])
        overall, *parts = self.weights.to(seconds.dtype) @ shares.to(seconds.dtype).T
        values = torch.cat([overall, torch.stack(parts).amin(0), seconds])
        self.exchange.average([values])
        staged: Any = ([label for label, _ in taken], values.to("cpu", non_blocking=True), None)
        if self.device.type == "cuda":
            # Read at the next review, when it has long arrived, rather than waited for now.
            event = torch.cuda.Event()
            event.record()
            staged, self._staged = self._staged, (*staged[:2], event)
        if staged is None:
            return
        labels, values, event = staged
        if event is not None:
            event.synchronize()
        path, both, path_worst, both_worst, *means = values.tolist()
        readings = [(plan, size, mean) for (plan, size), mean in zip(labels, means, strict=True)]
        self.controller.review(readings, (Explained(path, path_worst), Explained(both, both_worst)))
        self.reviews += 1

    def state_dict(self) -> list[list[float]]:
        """What was timed since the last review, one row per micro-batch: fraction, ridge, size, seconds."""
        taken: list[Any] = self.stopwatch.state_dict()
        return [[plan.fraction, float(plan.ridge), size, seconds] for (plan, size), _, seconds in taken]

    def load_state_dict(self, rows: list[list[float]]) -> None:
        """Restore :meth:`state_dict`."""
        self.stopwatch.load_state_dict(
            [((Plan(fraction, bool(ridge)), int(size)), size, seconds) for fraction, ridge, size, seconds in rows]
        )

    def metrics(self, ready: bool) -> dict[str, float]:
        """The present plan, its cost and price, and the time saved so far, as of the last review."""
        controller = self.controller
        plan = controller.plan if ready else EXACT
        figures = {"fraction": plan.fraction, "ridge": float(plan.ridge and not plan.exact)}
        if not controller.automatic:
            return figures
        cost, rest = controller.costs.relative(plan), 1.0 - plan.fraction
        return {
            **figures,
            "rho2_weighted": controller.rho2[plan.ridge].overall,
            "rho2_worst": controller.rho2[plan.ridge].worst,
            "cost": cost,
            "kappa": (cost - plan.fraction) / rest if rest > 0.0 else 0.0,
            "overhead": cost - plan.fraction - rest * _IDEAL_PREDICTION,
            "price": controller.price,
            "time_saved": controller.saved,
        }
