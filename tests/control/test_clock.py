"""Laps: the time of the work itself, also where a device is given work and goes on by itself."""

from __future__ import annotations

import time

import pytest
import torch

from hf_lgp.control.clock import Lap, mark


def test_work_on_an_accelerator_without_events_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = [0.0, 0.02]
    monkeypatch.setattr(torch.mps, "synchronize", lambda: time.sleep(queue.pop(0)))
    lap = Lap(mark(torch.device("mps")), mark(torch.device("mps")))
    assert lap.seconds() >= 0.02 and not queue


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_elsewhere_nothing_is_waited_for(device: str) -> None:
    assert 0.0 <= Lap(mark(torch.device(device)), mark(torch.device(device))).seconds() < 10.0
