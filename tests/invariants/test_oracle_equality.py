"""The strongest single test: with an oracle in place of the predictor, every step's gradient is plain Trainer's."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle_trainer import Case, check, every_case


@pytest.mark.parametrize("case", every_case(), ids=lambda case: f"{case.family}-{case.loss}-{case.accumulation}")
def test_gradients_and_losses_are_those_of_plain_training(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
