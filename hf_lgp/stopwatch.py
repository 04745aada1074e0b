"""A stopwatch for work on a device that never waits for it."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

import torch


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
            self._taken.append((label, size, self._began, self._now()))
        self._began = None

    def collect(self) -> list[tuple[Hashable, float]]:
        """Labels and seconds per unit of all work that has ended by now, in order; each is given once."""
        done = []
        while self._taken and (not self._events or self._taken[0][3].query()):
            label, size, began, ended = self._taken.pop(0)
            seconds = began.elapsed_time(ended) / 1e3 if self._events else ended - began
            done.append((label, seconds / size))
        return done

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
