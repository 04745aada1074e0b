"""The walkthrough runs from top to bottom, and its model has learnt the digits."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def test_it_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "walkthrough.py"))
    assert names["accuracy"] > 0.8
    printed = capsys.readouterr().out
    assert "expected price" in printed and "## Linear gradient prediction" in printed
