"""What experiment trackers receive: ``report_to`` works as with Trainer, offline, and carries the readings."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "train_vit.py"
RUN = (
    "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 4 --use_cpu --max_steps 8 --logging_steps 2 "
    "--per_device_train_batch_size 16 --max_train_samples 64 --max_eval_samples 32 --save_strategy no --lgp_control_fraction 0.25 "
    "--lgp_warmup_examples 16 --lgp_window 64 --lgp_rank 4"
)
READINGS = {"loss", "lgp_fraction", "lgp_rho2", "lgp_exact_share", "lgp_coverage"}


def train(folder: Path, tracker: str, *others: str, **environment: str) -> str:
    """Run the example script with a tracker and return what it printed."""
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *RUN.split(), "--report_to", tracker, *others]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_tensorboard_has_the_readings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "out", "tensorboard", TENSORBOARD_LOGGING_DIR=str(tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {f"train/{name}" for name in READINGS} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/lgp_fraction")][:4] == [2, 4, 6, 8]
    assert events.Scalars("train/lgp_fraction")[-1].value == 0.25


def test_trackio_has_the_readings(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    where = tmp_path / "trackio"
    train(tmp_path / "out", "trackio", "--project", "digits", "--run_name", "first", TRACKIO_DIR=str(where))
    with sqlite3.connect(where / "digits.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    assert any({f"train/{name}" for name in READINGS} <= row.keys() for row in rows)
    assert [row["train/lgp_fraction"] for row in rows if "train/lgp_fraction" in row][-1] == 0.25
