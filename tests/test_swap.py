"""The side-by-side example runs and both trainers learn."""

from __future__ import annotations

import math

import swap


def test_both_learn() -> None:
    results = swap.main(epochs=3)
    assert list(results) == ["Trainer", "LGPTrainer"]
    assert all(result["eval_loss"] < math.log(10) for result in results.values())
