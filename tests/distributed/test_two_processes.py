"""Real runs on two processes (gloo, CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import ACCELERATE, TORCHRUN, on_two_processes
from oracle_trainer import every_case


@pytest.mark.parametrize("find_unused", [True, False])
def test_ranks_stay_equal_with_predictions_and_accumulation(find_unused: bool, tmp_path: Path) -> None:
    launcher = ACCELERATE if find_unused else TORCHRUN
    output = on_two_processes("two_processes.py", str(tmp_path), str(find_unused), launcher=launcher)
    assert output.count("agrees") == 2


def test_oracle_gradients_are_those_of_plain_training_on_two_processes(tmp_path: Path) -> None:
    output = on_two_processes("oracle_two_processes.py", str(tmp_path), timeout=600)
    assert output.count(f"agrees in {len(every_case())} combinations") == 2
