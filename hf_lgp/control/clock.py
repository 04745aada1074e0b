"""Time of work on a device, read without waiting for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Lap:
    """A piece of work between two marks: host seconds, or events in a GPU's queue."""

    began: Any
    ended: Any

    def seconds(self) -> float:
        """Its duration; on a GPU this waits until it has passed."""
        if isinstance(self.ended, float):
            return float(self.ended - self.began)
        self.ended.synchronize()
        return float(self.began.elapsed_time(self.ended)) / 1e3


def mark(device: torch.device) -> Any:
    """The present moment, for a :class:`Lap`: in CUDA's queue, on the host's clock elsewhere, once the device has done what it was given."""
    if device.type != "cuda":
        synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)  # some have none
        if synchronize is not None and device.type != "cpu":
            synchronize()
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
