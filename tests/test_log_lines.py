"""What a progress bar says, and the line at the end of a run."""

from __future__ import annotations

import pytest

from hf_lgp.report.log_lines import postfix, summary

SHARES = {"steps_predicted": 0.9, "examples_predicted": 0.71}


def test_a_progress_bar_says_nothing_while_nothing_is_predicted() -> None:
    assert postfix({"fraction": 1.0}) == ""
    assert postfix({"fraction": 0.25}) == "1/4 exact"
    figures = {"fraction": 0.125, "variance_explained": 0.987, "seconds_saved": 12.3}
    assert postfix(figures) == "1/8 exact, 99% explained, 12 s saved"


@pytest.mark.parametrize(
    ("shares", "saved", "refused", "said"),
    [
        (SHARES, 38.0, None, "71% of examples had predicted gradients; estimated 38% less time than Trainer at equal steps."),
        (SHARES, -10.0, None, "71% of examples had predicted gradients; estimated 19% more time than Trainer at equal steps."),
        (SHARES, None, "it was lost", "71% of examples had predicted gradients."),
        ({}, None, "it has no blocks", "all gradients were exact, because it has no blocks."),
        ({}, 0.1, None, "all gradients were exact; predictions did not pay, or the run was too short to tell."),
        ({}, 62.0, None, "too short to tell; estimated 50% less time than Trainer at equal steps."),
    ],
)  # fmt: skip
def test_a_run_ends_with_one_line(shares: dict[str, float], saved: float, refused: str, said: str) -> None:
    line = summary(shares, 62.0, saved, refused)
    assert line.startswith("LGPTrainer: ") and line.endswith(said)
