"""The step of one version of the package against another's, side by side: mean over whole cycles, measuring steps included.

Every version trains by ``LGPTrainer`` at a fixed control fraction in a process of its own, one after the other, in alternating order; the
figure is the mean time of ``training_step`` over the last ``--steps`` micro-batches. Plain ``Trainer``, an eighth, and exact steps whose last block is run
on one row come from the new version.

    git worktree add /tmp/old COMMIT
    python benchmarks/versions.py --old /tmp/old --new . --vit cifar-101 --batch 96
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, VITS, build_vit, environment, write_json

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "trainer": ("new", {"lgp_control_fraction": 1.0}),
    "old": ("old", {"lgp_control_fraction": 0.25}),
    "new": ("new", {"lgp_control_fraction": 0.25}),
    "new, 1/8": ("new", {"lgp_control_fraction": 0.125}),
    "new, exact, last block on one row": ("new", {"lgp_exact_steps": 10**6}),
}
"""Which version, and its settings."""


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random images and labels."""

    def __init__(self, side: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, side, side, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def seconds_per_step(options: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Mean seconds of ``training_step`` in this process."""
    from hf_lgp import LGPTrainer, LGPTrainingArguments

    spent: list[float] = []

    class Timed(LGPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            began = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            spent.append(time.perf_counter() - began)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = LGPTrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=options.batch,
            max_steps=options.warmup + options.steps,
            optim="sgd",
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        data = Images(VITS[options.vit]["image_size"], 4 * options.batch)
        trainer = Timed(build_vit(options.vit, attn_implementation="sdpa"), args, train_dataset=data)
        trainer.train()
    return statistics.mean(spent[-options.steps :])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the other version")
    parser.add_argument("--new", type=Path, default=Path(__file__).parents[1], help="this version's checkout")
    parser.add_argument("--vit", choices=list(VITS), default="cifar-101")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--warmup", type=int, default=14, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=64, help="steps that are: whole cycles of both versions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(seconds_per_step(options, ARMS[options.arm][1])))
        return
    path = options.output / f"versions_{options.vit}.json"
    result: dict[str, Any] = {"settings": {"batch": options.batch, "steps": options.steps}, "seconds": []}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
    while len(result["seconds"]) < options.repeats:
        arms = list(ARMS) if len(result["seconds"]) % 2 == 0 else list(ARMS)[::-1]
        seconds = {}
        for arm in arms:
            where = str((options.old if ARMS[arm][0] == "old" else options.new).resolve())
            environ = {**os.environ, "PYTHONPATH": where}
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
            seconds[arm] = float(done.stdout.strip().splitlines()[-1])
            print(f"{arm}: {seconds[arm]:.3f} s", flush=True)
        result["seconds"].append(seconds)
        result["environment"] = environment(torch.device("cpu"))
        write_json(path, result)
    for arm in ARMS:
        ratios = [seconds[arm] / seconds["trainer"] for seconds in result["seconds"]]
        print(f"{arm}: {statistics.median(ratios):.3f} of Trainer's step ({min(ratios):.3f} to {max(ratios):.3f})")
    ratios = [seconds["new"] / seconds["old"] for seconds in result["seconds"]]
    print(f"new / old: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
