"""Laps: the time of the work itself, also where a device is given work and goes on by itself."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from hf_lgp.control.clock import Lap, mark


def test_work_on_an_accelerator_without_events_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = [0.0, 0.02]
    module = SimpleNamespace(synchronize=lambda: time.sleep(queue.pop(0)))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    lap = Lap(mark(torch.device("mps")), mark(torch.device("mps")))
    assert lap.seconds() >= 0.02 and not queue


def test_on_a_cpu_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: 1 / 0)
    assert 0.0 <= Lap(mark(torch.device("cpu")), mark(torch.device("cpu"))).seconds() < 10.0
