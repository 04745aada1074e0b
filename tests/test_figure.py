"""The figure of a run: what is drawn, when nothing is, and that a failing figure stops no training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lgp.report.figure import draw_history, series
from hf_lgp.run_callback import RunCallback

HISTORY: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.0, "lgp/fraction": 1.0},
    {"step": 20, "loss": 1.5, "lgp/fraction": 0.25, "lgp/variance_explained": 0.8},
    {"step": 20, "eval_loss": 1.6, "eval_accuracy": 0.5},
    {"step": 30, "loss": float("nan"), "lgp/fraction": 0.25},
    {"step": 40, "loss": 1.0, "lgp/fraction": 0.125, "lgp/variance_explained": 0.9},
    {"step": 40, "train_runtime": 3.0},
]


def test_series_leave_out_what_is_missing_or_not_finite() -> None:
    assert series(HISTORY, "loss") == ([10, 20, 40], [2.0, 1.5, 1.0])
    assert series(HISTORY, "lgp/variance_explained") == ([20, 40], [0.8, 0.9])
    assert series([{"loss": 1.0}], "loss") == ([0.0], [1.0])
    assert series([], "loss") == ([], [])


def test_a_figure_is_drawn_without_touching_pyplot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    path = tmp_path / "lgp.png"
    for _ in range(2):  # the second one replaces the first
        assert draw_history(HISTORY, path)
    assert path.read_bytes().startswith(b"\x89PNG") and [entry.name for entry in tmp_path.iterdir()] == ["lgp.png"]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "history",
    [[], [{"step": 5, "loss": 1.0}], [{"step": 5, "eval_loss": 1.0}], [{"step": 5, "loss": 1.0, "lgp/fraction": 1.0}]],
)
def test_nothing_is_drawn_of_a_run_without_readings(history: list[dict[str, Any]], tmp_path: Path) -> None:
    assert not draw_history(history, tmp_path / "lgp.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw_history(HISTORY, tmp_path / "lgp.png")
    assert not list(tmp_path.iterdir())


def _finish(folder: Path, **state: Any) -> None:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    RunCallback(lambda: None).on_train_end(arguments, TrainerState(log_history=HISTORY, **state), TrainerControl())


def test_the_callback_draws_on_the_main_process_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _finish(tmp_path / "other", is_world_process_zero=False)
    assert not (tmp_path / "other" / "lgp.png").exists()
    _finish(tmp_path / "main")
    assert (tmp_path / "main" / "lgp.png").exists()


def test_a_failing_figure_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "lgp.png").mkdir()  # a folder in its place
    logging.getLogger("hf_lgp").propagate = True
    with caplog.at_level("WARNING"):
        _finish(tmp_path)
    assert "No figure" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["lgp.png"]
