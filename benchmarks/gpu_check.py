"""What a GPU at hand says: times of steps by batch size beside what they are on paper, and peak memory; then a short time to accuracy.

Every finished cell is saved, and a second call goes on from there. Cells are left out once they would not end in time.

    python benchmarks/gpu_check.py --data FOLDER --seconds 560
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import step_cost
import torch
from common import RESULTS, environment, write_json

from hf_lgp.control.plan import StepPlan
from hf_lgp.rows.walk import RowBudget

CELLS = [("vit-base-16", 32), ("vit-base-16", 128), ("vit-small-16", 64), ("vit-base-16", 64), ("vit-base-16", 8)]
_ROUNDS = 7


def peak_memory(vit: str, batch: int, device: torch.device) -> dict[str, int]:
    """Bytes beyond the parameters that an exact and a predicted step take at most."""
    steps = step_cost.Steps(vit, batch, RowBudget(2, 2), device, True, "sdpa")
    found: dict[str, int] = {}
    for name, plan in {"exact": StepPlan(), "predicted": StepPlan(0.25, first_row=True, seed=1)}.items():
        for _ in range(2):
            steps.model.zero_grad()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            steps.step(plan, batch)
        found[name] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return found


def paper(gpu: str) -> str | None:
    """The GPU of the paper's table whose name stands in this one's; Hopper's for its larger sister."""
    return next(
        (known for known in ("T4", "L4", "A10G", "A100", "4090", "H100") if known in gpu.replace("H200", "H100")), None
    )


def beside_paper(vit: str, batch: int, gpu: str) -> float | None:
    """What a predicted step costs on paper, in exact ones."""
    path = RESULTS / f"paper_cost_{vit}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["gpus"] if path.is_file() else {}
    figures = known.get(paper(gpu) or "", {}).get(str(batch))
    return None if figures is None else float(figures["eager"]["predicted"])


def summary(cells: dict[str, Any], gpu: str) -> str:
    """A line for each cell."""
    lines = [f"On {gpu}, bf16, of an exact step:"]
    for name, cell in cells.items():
        vit, batch = name.split(", batch ")
        told, ratio = beside_paper(vit, int(batch), gpu), cell["steps"]["f = 0.25"]["cost"]
        memory = cell["peak_memory"]["predicted"] / max(1, cell["peak_memory"]["exact"])
        lines.append(
            f"{name}: exact {1e3 * cell['exact_seconds']:.1f} ms; f = 1/4 {ratio:.2f}"
            f"{'' if told is None else f', on paper {told:.2f}'}; measuring {cell['steps']['f = 0.25, measuring']['cost']:.2f}; peak memory {memory:.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with CIFAR-10 as train.parquet and test.parquet; without, no accuracies"
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="time there is")
    parser.add_argument("--name", default="gpu_check")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="one small cell, to see whether it runs")
    options = parser.parse_args(arguments)
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    path = options.output / f"{options.name}.json"
    cells: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    longest = 0.0
    for vit, batch in [("cifar-0.8m", 32)] if options.smoke else CELLS:
        name, left = f"{vit}, batch {batch}", options.seconds - (time.monotonic() - began)
        if name in cells or left < 1.5 * longest:
            continue
        start, rounds = time.monotonic(), 1 if options.smoke else _ROUNDS
        cell = step_cost.measure(vit, batch, [0.25], rounds, RowBudget(2, 2), device, True, "sdpa")
        cells[name] = cell | {"peak_memory": peak_memory(vit, batch, device)}
        longest = max(longest, time.monotonic() - start)
        write_json(path, {"environment": environment(device), "cells": cells})
    print(summary(cells, gpu), flush=True)
    left = options.seconds - (time.monotonic() - began)
    if options.data is not None and left > 60.0:
        script = Path(__file__).parent / "time_to_accuracy.py"
        command = [
            sys.executable,
            script,
            "--data",
            options.data,
            "--vit",
            "vit-small-16",
            "--images",
            8000,
            "--epochs",
            3,
        ]
        command += ["--bf16", "--seeds", 0, 1, "--eval-points", 3, "--name", f"time_to_accuracy_{options.name}"]
        try:
            subprocess.run([str(word) for word in command], timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print("Time is up: finished runs are kept, and the same command goes on from there.")


if __name__ == "__main__":
    main()
