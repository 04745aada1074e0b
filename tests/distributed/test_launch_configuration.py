"""``accelerate launch`` with the examples' own configuration file: two CPU processes learn the demo as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "examples" / "accelerate" / "cpu_two_processes.yaml"
SIZES = (
    "--image_size 16 --patch_size 4 --hidden_size 64 --num_hidden_layers 4 --random_crop_padding 1 --learning_rate 1e-3 "
    "--lr_scheduler_type cosine --warmup_steps 100 --logging_steps 100 --disable_tqdm true --use_cpu --save_strategy no"
)


def train(launcher: list[str], folder: Path, *others: str) -> dict[str, float]:
    """Train the demo and return its metrics."""
    command = [*launcher, str(ROOT / "examples" / "train_vit.py"), "--output_dir", str(folder), *SIZES.split(), *others]
    # Ports and threads are the machine's business, not the file's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "all_results.json").read_text())


def launch() -> list[str]:
    module = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return [*module, "--config_file", str(CONFIGURATION)]


@pytest.mark.slow
def test_two_processes_start_from_the_file_and_share_one_run(tmp_path: Path) -> None:
    metrics = train(launch(), tmp_path, "--max_steps", "12", "--per_device_train_batch_size", "16")
    assert metrics["epoch"] == pytest.approx(12 * 32 / 1437, rel=0.05), "both processes take part in every step"
    assert (tmp_path / "README.md").is_file() and (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_reach_the_accuracy_of_one(tmp_path: Path) -> None:
    fraction = ("--lgp_control_fraction", "0.5", "--num_train_epochs", "40")
    two = train(launch(), tmp_path / "two", *fraction, "--per_device_train_batch_size", "32")
    one = train([sys.executable], tmp_path / "one", *fraction, "--per_device_train_batch_size", "64")
    assert one["epoch"] == pytest.approx(two["epoch"])
    assert min(one["eval_accuracy"], two["eval_accuracy"]) > 0.94
    assert abs(one["eval_accuracy"] - two["eval_accuracy"]) < 0.03
