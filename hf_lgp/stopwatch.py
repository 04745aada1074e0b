"""A stopwatch for work on a device that never waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

_IN_FLIGHT = 4
"""Pieces of work that a GPU may still be busy with; a fixed number, so that all processes collect the same."""


_KEPT = 512
"""Pieces of work that are kept for whoever collects them; older ones are forgotten."""


class Stopwatch:
    """Durations of labelled pieces of work, to be collected later.

    On a GPU, events in the queue mark beginning and end, and their distance is read once both have passed; elsewhere the
    host's clock serves.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._began: Any = None
        self._taken: list[tuple[Hashable, float, Any, Any]] = []

    def start(self) -> None:
        """Begin a piece of work."""
        self._began = self._now()

    def stop(self, label: Hashable, size: float) -> None:
        """End it; nothing happens if none was begun.

        Args:
            label: What was done.
            size: How much of it: durations are given for one unit.
        """
        if self._began is not None:
            self._taken = [*self._taken[-_KEPT:], (label, size, self._began, self._now())]
        self._began = None

    def collect(self, wait: bool = False) -> list[tuple[Hashable, float]]:
        """Labels and seconds per unit of the work done so far, in order; each is given once.

        On a GPU the newest pieces, which may still be in its queue, are left for the next time.

        Args:
            wait: Whether to wait for them instead.
        """
        count = max(0, len(self._taken) - (_IN_FLIGHT if self._events and not wait else 0))
        taken, self._taken = self._taken[:count], self._taken[count:]
        return [(label, self._seconds(began, ended) / size) for label, size, began, ended in taken]

    def least(self, wanted: Callable[[Any], bool]) -> float | None:
        """Seconds per unit of the shortest piece not collected yet whose label is wanted; None if unknown without waiting.

        Args:
            wanted: Tells of a label whether it is wanted.
        """
        if self._events:
            return None
        pieces = ((ended - began) / size for label, size, began, ended in self._taken if wanted(label))
        return min(pieces, default=None)

    def state_dict(self) -> list[tuple[Hashable, float, float]]:
        """Labels, sizes and seconds of what was not collected yet; on a GPU this waits for it."""
        return [(label, size, self._seconds(began, ended)) for label, size, began, ended in self._taken]

    def load_state_dict(self, taken: list[tuple[Hashable, float, float]]) -> None:
        """Restore :meth:`state_dict`."""
        self._taken = [(label, size, 0.0, seconds) for label, size, seconds in taken]

    def _seconds(self, began: Any, ended: Any) -> float:
        if isinstance(ended, float):
            return float(ended - began)
        ended.synchronize()  # has long passed
        return float(began.elapsed_time(ended)) / 1e3

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
