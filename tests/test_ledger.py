"""The line at the end of a run."""

from __future__ import annotations

import pytest

from hf_lgp.ledger import summary

STEPS = {"exact": 10, "predicted": 90}


def test_a_fixed_fraction() -> None:
    line = summary({"fraction": 0.25, "rho2": 0.912, "window": 64.0}, STEPS, 60.0)
    assert (
        "90 of 100 micro-batches" in line
        and "91% of their variance" in line
        and line.endswith("control fraction 0.25.")
    )


def test_time_saved() -> None:
    line = summary({"fraction": 0.25, "rho2": 0.9, "time_saved": 40.0, "window": 64.0}, STEPS, 60.0)
    assert line.endswith("About 40 s saved: 40% of what exact training would have taken.")


def test_nothing_learnt() -> None:
    line = summary(
        {"fraction": 1.0, "rho2": 0.0, "window": 0.0, "time_saved": -0.1}, {"exact": 50, "predicted": 0}, 9.0
    )
    assert "0 of 50 micro-batches" in line and "nothing was learnt" in line


@pytest.mark.parametrize("steps", [STEPS, {"exact": 100, "predicted": 0}])
def test_nothing_saved(steps: dict[str, int]) -> None:
    line = summary({"fraction": 1.0, "rho2": 0.2, "time_saved": -1.25, "window": 64.0}, steps, 60.0)
    assert f"{steps['predicted']} of 100 micro-batches" in line
    assert "did not pay here within the variance budget" in line and "took about 1.2 s of 60.0 s" in line
