"""The walkthrough runs from top to bottom, with fewer epochs, and its model has learnt something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_it_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parents[1] / "examples" / "walkthrough.py").read_text(encoding="utf-8")
    assert "num_train_epochs=8" in source
    names: dict[str, Any] = {"__name__": "walkthrough"}
    exec(compile(source.replace("num_train_epochs=8", "num_train_epochs=2"), "walkthrough.py", "exec"), names)
    assert names["accuracy"] > 0.2
    printed = capsys.readouterr().out
    assert "control fraction" in printed and "## Linear gradient prediction" in printed
