"""What experiment trackers receive: ``report_to`` works as with Trainer, offline, and carries the readings."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments

READINGS = {"loss", "lgp/fraction", "lgp/variance_explained", "lgp/variance"}


def train(folder: Path, trackers: list[str]) -> None:
    """A run that reports to trackers, which read from the environment where to leave what they get."""
    os.environ |= {"TENSORBOARD_LOGGING_DIR": str(folder / "events"), "TRACKIO_DIR": str(folder / "trackio")}
    arguments = LGPTrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=48,
        logging_steps=12,
        save_strategy="no",
        disable_tqdm=True,
        report_to=trackers,
        project="digits",
        run_name="first",
        lgp_control_fraction=0.25,
    )
    LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=TinyImages(64, dtype=torch.float32)).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run with every tracker that is installed left what it logged."""
    trackers = [name for name in ("tensorboard", "trackio") if importlib.util.find_spec(name)]
    if not trackers:
        pytest.skip("no tracker is installed")
    where = tmp_path_factory.mktemp("trackers")
    child = multiprocessing.get_context("fork").Process(target=train, args=(where, trackers))
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0
    return where


def test_tensorboard_has_the_readings(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert {f"train/{name}" for name in READINGS} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/lgp/fraction")][:4] == [12, 24, 36, 48]
    assert events.Scalars("train/lgp/fraction")[-1].value == 0.25


def test_trackio_has_the_readings(folder: Path) -> None:
    pytest.importorskip("trackio")
    with sqlite3.connect(folder / "trackio" / "digits.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    assert any({f"train/{name}" for name in READINGS} <= row.keys() for row in rows)
    assert [row["train/lgp/fraction"] for row in rows if "train/lgp/fraction" in row][-1] == 0.25
