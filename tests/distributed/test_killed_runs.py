"""Straight run equals run, kill -9, resume: bit for bit, in one process and in two."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import TORCHRUN, start
from torch import Tensor

ALONE = [sys.executable]


def assert_identical(one: Any, other: Any, name: str = "state") -> None:
    """Compare nested state bit for bit."""
    assert type(one) is type(other), name
    if isinstance(one, Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_identical(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for position, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{name}[{position}]")
    else:
        assert one == other, name


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(ALONE, id="one process"), pytest.param(TORCHRUN, id="two processes", marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(launcher: list[str], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = start(launcher, "killed_run.py", str(straight), "-1")
    assert result.returncode == 0, result.stderr[-3000:]
    # Step 13 is in the middle of an epoch, three steps after a checkpoint; step 20 has just been reached, and not yet saved.
    for step, checkpoint in ((13, ""), (20, "checkpoint-10")):
        result = start(
            launcher, "killed_run.py", str(killed), str(step), str(killed / checkpoint) if checkpoint else ""
        )
        assert result.returncode != 0 and "finished" not in result.stdout
        assert not (killed / "final.pt").exists()
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-15"}
    result = start(launcher, "killed_run.py", str(killed), "-1", str(killed / "checkpoint-15"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "starts afresh" not in result.stdout + result.stderr
    expected, found = (torch.load(folder / "final.pt") for folder in (straight, killed))
    assert len(expected["losses"]) == len(found["losses"]) == 26
    assert_identical(expected, found)
    shutil.rmtree(tmp_path)


def test_another_number_of_processes_goes_on_with_the_predictor(tmp_path: Path) -> None:
    result = start(TORCHRUN, "killed_run.py", str(tmp_path), "13")
    assert result.returncode != 0
    result = start(ALONE, "killed_run.py", str(tmp_path), "-1", str(tmp_path / "checkpoint-10"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "starts afresh" not in result.stdout + result.stderr
    losses = torch.load(tmp_path / "final.pt")["losses"]
    shares = {entry["step"]: entry["lgp_exact_share"] for entry in losses}
    assert shares[11] < shares[10], "no exact step was needed after the change"
