"""Straight run equals run, kill -9, resume: bit for bit, in one process and in two."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from launch import TORCHRUN, forked, start
from torch import Tensor


def alone(*arguments: str) -> bool:
    """Run it in one process; tells whether it came to its end."""
    (code,) = forked(killed_run.main, *arguments)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def launched(*arguments: str) -> bool:
    """On two processes."""
    result = start(TORCHRUN, "killed_run.py", *arguments)
    assert "measured anew" not in result.stdout + result.stderr
    return result.returncode == 0


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


@pytest.fixture(scope="module")
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What a straight run ended with, and one that was killed twice."""
    run, folder = {"one process": alone, "two processes": launched}[request.param], tmp_path_factory.mktemp("killed")
    straight, killed = folder / "straight", folder / "killed"
    assert run(str(straight), "-1")
    # Step 15 has just been reached, and not yet saved; step 23 is in the middle of an epoch, three steps after a checkpoint in which there is a
    # measurement that nobody had read yet.
    for step, checkpoint in (("15", ""), ("23", "checkpoint-10")):
        assert not run(str(killed), step, str(killed / checkpoint) if checkpoint else "")
        assert not (killed / "final.pt").exists()
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-20"}
    controller = json.loads((killed / "checkpoint-20" / "lgp_state.json").read_text())["controller"]
    assert controller["residuals"][0]["count"] == 1
    assert run(str(killed), "-1", str(killed / "checkpoint-20"))
    expected, found = (torch.load(folder / "final.pt") for folder in (straight, killed))
    return expected, found


TWO = "two processes"


@pytest.mark.parametrize("ends", ["one process", pytest.param(TWO, marks=pytest.mark.slow)], indirect=True)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(ends: tuple[Any, Any]) -> None:
    expected, found = (end["trained"] for end in ends)
    assert len(expected["losses"]) == 26
    assert_identical(expected, found)


@pytest.mark.parametrize("ends", ["one process", pytest.param(TWO, marks=pytest.mark.slow)], indirect=True)
def test_what_was_measured_goes_on_too(ends: tuple[Any, Any]) -> None:
    expected, found = (end["measured"] for end in ends)
    assert any(expected["variances"])
    assert_identical(expected, found)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_what_was_measured(tmp_path: Path) -> None:
    assert not launched(str(tmp_path), "23")
    assert alone(str(tmp_path), "-1", str(tmp_path / "checkpoint-20"))
    assert torch.load(tmp_path / "final.pt")["measured"]["session"]["controller"]["measurements"] == 1
