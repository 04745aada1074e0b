"""The review: times micro-batches and lets the controller choose a plan from what was measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .alignment import Alignment
from .controller import Controller
from .costs import REHEARSED
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
        self._review(wait=True)

    def begin(self, ready: bool, examples: int, size: int) -> None:
        """Begin a micro-batch of ``examples`` examples and ``size`` units of work, with a review if one is due.

        The one before it is timed up to here, optimizer and data loader included, unless it has ended.
        """
        if not self.controller.chooses:
            return
        self.end()
        if self.controller.review_due(ready):
            self._review(wait=self.controller.review_presses(ready))
        plan = self.controller.label(ready, examples)
        if plan is not None:
            self._label = plan, size
            self.stopwatch.start()

    def end(self) -> None:
        """End the present micro-batch, if it has not ended yet: what comes now is no part of it."""
        if self._label is not None:
            self.stopwatch.stop(self._label, self._label[1])
        self._label = None

    @property
    def rehearsed_in_vain(self) -> bool:
        """Whether the predictions just rehearsed took longer than exact steps.

        False where that is not known without waiting for the device, or for other processes, which have to do the same.
        """
        if self.exchange.processes > 1:
            return False
        rehearsed = self.stopwatch.least(lambda label: label[0] == REHEARSED)
        exact = self.controller.costs.seconds(EXACT) or self.stopwatch.least(lambda label: label[0] == EXACT)
        return rehearsed is not None and exact is not None and rehearsed > exact

    def _review(self, wait: bool) -> None:
        if wait and self._staged is not None:
            self._read(self._staged)
            self._staged = None
        taken = self.stopwatch.collect(wait)
        seconds = torch.tensor([s for _, s in taken], dtype=torch.float64).to(self.device, non_blocking=True)
        values = torch.cat([*self._explained(), seconds])
        self.exchange.average([values])
        labels: list[Any] = [label for label, _ in taken]
        if wait or self.device.type != "cuda":
            self._read((labels, values, None))
            return
        # Read at the next review, when it has long arrived, rather than waited for now.
        event = torch.cuda.Event()
        staged, self._staged = self._staged, (labels, values.to("cpu", non_blocking=True), event)
        event.record()
        if staged is not None:
            self._read(staged)

    def _read(self, staged: tuple[list[tuple[Plan, int]], Tensor, Any]) -> None:
        labels, values, event = staged
        if event is not None:
            event.synchronize()
        path, both, path_worst, both_worst, *means = values.tolist()
        readings = [(plan, size, mean) for (plan, size), mean in zip(labels, means, strict=True)]
        self.controller.review(readings, (Explained(path, path_worst), Explained(both, both_worst)))
        self.reviews += 1

    def _explained(self) -> tuple[Tensor, Tensor]:
        """Shares explained without and with the regression, overall and in the worst part, shape ``(2,)`` each.

        A tensor in which no gradient was seen yet, because the model does not use it, counts for nothing.
        """
        shares = torch.stack([self.alignment.path_rho2, self.alignment.rho2]).to(self.weights)
        seen = (self.alignment.variance > 0).to(self.weights)
        used = 1.0 - self.weights @ (1.0 - seen)
        parts = (self.weights * seen) @ shares.T / used.clamp(min=1e-9)[:, None]
        parts = torch.where(used[:, None] > 1e-9, parts, torch.ones_like(parts))
        overall = torch.where(seen.any(), parts[0], torch.zeros_like(parts[0]))
        return overall, torch.minimum(overall, parts[1:].amin(0))

    def state_dict(self) -> dict[str, Any]:
        """What was timed since the last review, one row per micro-batch (fraction, ridge, size, seconds), and what was staged.

        On a GPU this waits for it.
        """
        taken: list[Any] = self.stopwatch.state_dict()
        staged: list[Any] = []
        if self._staged is not None:
            labels, values, event = self._staged
            if event is not None:
                event.synchronize()
            staged = [[[plan.fraction, plan.ridge, size] for plan, size in labels], values.tolist()]
        return {
            "taken": [[plan.fraction, plan.ridge, size, seconds] for (plan, size), _, seconds in taken],
            "staged": staged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.stopwatch.load_state_dict(
            [((Plan(fraction, ridge), size), size, seconds) for fraction, ridge, size, seconds in state["taken"]]
        )
        self._staged = None
        if state["staged"]:
            labels, values = state["staged"]
            known = [(Plan(fraction, ridge), size) for fraction, ridge, size in labels]
            self._staged = known, torch.tensor(values, dtype=torch.float64), None

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
            "rho2_weighted": controller.explained.overall,
            "rho2_worst": controller.explained.worst,
            "cost": cost,
            "kappa": (cost - plan.fraction) / rest if rest > 0.0 else 0.0,
            "overhead": cost - plan.fraction - rest * _IDEAL_PREDICTION,
            "price": controller.price,
            "time_saved": controller.saved,
        }
