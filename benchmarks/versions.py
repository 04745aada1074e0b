"""The step of one version of the package against another's, side by side: the mean over whole cycles, measuring steps included.

Every version trains by ``LGPTrainer`` at a fixed control fraction in a process of its own. The processes of a repeat take turns of some seconds, in alternating order, and
only one works at a time: a machine that grows slower meanwhile does so for all. The figure is the mean time of ``training_step`` over the last ``--steps`` micro-batches. Plain ``Trainer``, an eighth, and exact steps whose last block is run
on one row come from the new version. Finished repeats are kept, and a second call goes on from there.

    git worktree add /tmp/old COMMIT
    python benchmarks/versions.py --old /tmp/old --new . --vit cifar-101 --fraction 0.25 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import BATCHES, RESULTS, VITS, build_vit, environment, random_images, write_json
from turns import Turns, referee

TRAINER, OLD, NEW = "trainer", "old", "new"


def arms_of(fraction: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Which version, and its settings, by name."""
    return {
        TRAINER: ("new", {}),
        OLD: ("old", {"lgp_control_fraction": fraction}),
        NEW: ("new", {"lgp_control_fraction": fraction}),
        "new, 1/8": ("new", {"lgp_control_fraction": 0.125}),
        "new, exact, last block on one row": ("new", {"lgp_exact_steps": 10**6}),
    }


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random images and labels."""

    def __init__(self, vit: str, count: int) -> None:
        self.pixels, self.labels = random_images(vit, count)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def seconds_per_step(options: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Mean seconds of ``training_step`` in this process; plain ``Trainer`` without settings."""
    from transformers import Trainer, TrainingArguments

    from hf_lgp import LGPTrainer, LGPTrainingArguments

    kind, arguments = (LGPTrainer, LGPTrainingArguments) if settings else (Trainer, TrainingArguments)
    spent: list[float] = []
    turns = Turns(options.turns)
    turns.wait()

    class Timed(kind):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if turns.over:
                turns.wait()
            began = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            spent.append(time.perf_counter() - began)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
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
        model = build_vit(options.vit, attn_implementation="sdpa")
        Timed(model, args, train_dataset=Images(options.vit, 4 * options.batch)).train()
    return statistics.mean(spent[-options.steps :])


def in_turns(arms: dict[str, Path]) -> dict[str, float]:
    """Seconds per step of each arm, by the version in its folder.

    Raises:
        SystemExit: If the package comes from elsewhere.
    """
    with tempfile.TemporaryDirectory() as where:
        told = {arm: Path(where) / f"{number}.json" for number, arm in enumerate(arms)}
        commands = [
            ["env", f"PYTHONPATH={folder}", sys.executable, *sys.argv, "--arm", arm, "--told", str(told[arm])]
            for arm, folder in arms.items()
        ]
        referee(commands)
        answers = {arm: json.loads(path.read_text(encoding="utf-8")) for arm, path in told.items()}
    for arm, answer in answers.items():
        if not Path(answer["package"]).is_relative_to(arms[arm]):
            raise SystemExit(f"{arm} ran {answer['package']}, not what is in {arms[arm]}.")
    return {arm: float(answer["seconds"]) for arm, answer in answers.items()}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Ratios to plain ``Trainer``, if it ran, and of the new version to the old one: of each repeat, and their median."""
    ratios = {
        arm: [run[arm] / run[TRAINER] for run in runs] for arm in runs[0] if TRAINER in runs[0] and arm != TRAINER
    }
    ratios["new / old"] = [run[NEW] / run[OLD] for run in runs]
    return {name: {"median": statistics.median(values), "ratios": values} for name, values in ratios.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the other version")
    parser.add_argument("--new", type=Path, default=Path(__file__).parents[1], help="this version's checkout")
    parser.add_argument("--vit", choices=list(VITS), default="cifar-101")
    parser.add_argument("--batch", type=int, default=0, help="0: 96 for cifar-101, 64 for others")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--warmup", type=int, default=16, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=64, help="steps that are: whole cycles of both versions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pair", action="store_true", help="the two versions alone")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--turns", type=float, default=2.0, help="seconds of a turn")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or BATCHES.get(options.vit, 64)
    arms = arms_of(options.fraction)
    if options.pair:
        arms = {arm: arms[arm] for arm in (OLD, NEW)}
    if options.arm:
        import hf_lgp

        seconds = seconds_per_step(options, arms[options.arm][1])
        told = {"seconds": seconds, "package": str(Path(hf_lgp.__file__).resolve())}
        options.told.write_text(json.dumps(told), encoding="utf-8")
        return
    path = options.output / f"{options.name or f'versions_{options.vit}'}.json"
    settings = {name: getattr(options, name) for name in ("vit", "batch", "fraction", "warmup", "steps", "turns")}
    runs: list[dict[str, float]] = []
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise SystemExit(f"{path} holds runs with other settings: choose another --name.")
        runs = stored["seconds"]
    while len(runs) < options.repeats:
        folders = {arm: (options.old if arms[arm][0] == "old" else options.new).resolve() for arm in arms}
        seconds = in_turns(dict(list(folders.items())[:: 1 if len(runs) % 2 == 0 else -1]))
        runs.append({arm: seconds[arm] for arm in arms})
        print(", ".join(f"{arm} {seconds[arm]:.3f} s" for arm in arms), flush=True)
        print(f"new / old: {seconds[NEW] / seconds[OLD]:.3f}", flush=True)
        result = {"settings": settings, "summary": summary(runs), "seconds": runs}
        write_json(path, {**result, "environment": environment(torch.device("cpu"))})
    for name, figures in summary(runs).items():
        of = "" if name == "new / old" else " of Trainer's step"
        single = figures["ratios"]
        print(f"{name}: {figures['median']:.3f}{of} ({min(single):.3f} to {max(single):.3f})")


if __name__ == "__main__":
    main()
