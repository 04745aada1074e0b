"""The stopwatch on the host's clock; test_gpu.py has the device's."""

from __future__ import annotations

import pytest
import torch

from hf_lgp.stopwatch import Stopwatch


def test_durations_per_unit_in_order_and_only_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    now = iter([1.0, 3.0, 10.0, 10.5])
    watch._now = lambda: next(now)  # type: ignore[method-assign]
    for label, size in (("a", 4.0), ("b", 0.5)):
        watch.start()
        watch.stop(label, size)
    assert watch.collect() == [("a", 0.5), ("b", 1.0)]
    assert watch.collect() == []


def test_the_least_of_what_was_not_collected() -> None:
    watch = Stopwatch(torch.device("cpu"))
    now = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    watch._now = lambda: next(now)  # type: ignore[method-assign]
    for label in ("a", "b", "a"):
        watch.start()
        watch.stop(label, 2.0)
    assert watch.least("a".__eq__) == 0.5 and watch.least("c".__eq__) is None
    watch.collect()
    assert watch.least("a".__eq__) is None


def test_what_was_not_collected_is_restored() -> None:
    watch, restored = Stopwatch(torch.device("cpu")), Stopwatch(torch.device("cpu"))
    watch.start()
    watch.stop("a", 2.0)
    restored.load_state_dict(watch.state_dict())
    (mine,), (theirs,) = watch.collect(), restored.collect()
    assert mine[0] == theirs[0] == "a" and theirs[1] == pytest.approx(mine[1], abs=1e-9)
    assert restored.state_dict() == []


def test_what_was_not_begun_does_not_end() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.stop("a", 1.0)
    watch.start()
    watch.stop("b", 1.0)
    watch.stop("c", 1.0)
    assert [label for label, _ in watch.collect()] == ["b"]
