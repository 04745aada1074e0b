"""The side-by-side example runs, and both trainers train alike."""

from __future__ import annotations

import pytest
import swap


def test_both_train_alike() -> None:
    results = swap.main(epochs=0.5)
    assert list(results) == ["Trainer", "LGPTrainer"]
    plain, predicted = (result["eval_loss"] for result in results.values())
    assert predicted == pytest.approx(plain, rel=0.05)
