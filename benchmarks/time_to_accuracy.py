"""Time to accuracy: plain ``Trainer`` against ``LGPTrainer`` and its ablations on one task, interleaved on one machine.

All arms train the same ViT from the same weights, with the same seeds, augmentation and hyper-parameters, and, but for the arms that say otherwise, the same batches. The clock
counts training alone, data loader and the check of the model included, and stands still while the model is evaluated. Every
run has a process of its own; the order of the arms is reversed at every second seed. Every finished run is saved at once, and a
second call continues where the first stopped. What the figures mean stands in ``accuracy_summary.py``.

Task ``scratch`` is CIFAR-10 from random weights. Task ``finetune`` gives a ViT that plain ``Trainer`` trained once on the first five
classes a new head for the other five; that first training is cached and never timed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accuracy_arms import ARMS, BATCH, EPOCHS, RATE
from accuracy_summary import draw, summarise
from accuracy_tasks import Task, finetune, scratch, scratch_folder, training_arguments
from common import RESULTS, VITS, BatchAugmented, Positions, environment, thinned, write_json
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from turns import Turns, referee

from hf_lgp import LGPTrainer, LGPTrainingArguments


class Watch(TrainerCallback):
    """Clocks of training alone, and accuracy at the given steps; evaluation draws no random numbers."""

    def __init__(self, task: Task, options: argparse.Namespace, steps: int) -> None:
        self.task, self.options, self.steps = task, options, steps
        points = min(options.eval_points, steps)
        self.points = {round(steps * part / points) for part in range(1, points + 1)}
        self.clocks = [0.0, 0.0]
        self.started = [0.0, 0.0]
        self.first_step = 0.0
        self.turns = Turns(options.turns)
        self.curve: list[dict[str, float]] = []

    def _now(self, device: torch.device) -> list[float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [time.perf_counter(), time.process_time()]

    def _pause(self, device: torch.device) -> None:
        self.clocks = [c + n - s for c, n, s in zip(self.clocks, self._now(device), self.started, strict=True)]

    def _read(self, step: int, model: Any, device: torch.device) -> None:
        few = tuple(part[: self.options.eval_images] for part in self.task.test)
        reading = evaluate(model, few, device, self.options.bf16)
        self.curve.append({"step": step, "seconds": self.clocks[0], "process_seconds": self.clocks[1], **reading})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._read(0, model, args.device)
        self.turns.wait()
        self.started = self._now(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if step == 1 or step in self.points or self.turns.over:
            self._pause(args.device)
            if step == 1:
                self.first_step = self.clocks[0]
            if step in self.points:
                self._read(step, model, args.device)
            if self.turns.over:
                self.turns.wait()
            self.started = self._now(args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pause(args.device)


@torch.no_grad()
def evaluate(model: Any, test: tuple[Tensor, ...], device: torch.device, bf16: bool) -> dict[str, float]:
    """Loss and accuracy in evaluation mode, in Trainer's precision."""
    training = model.training
    model.eval()
    logits = []
    for part in test[0].split(250):  # few enough to need less memory than training
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits.append(model(pixel_values=part.to(device).float() / 127.5 - 1.0).logits.float().cpu())
    model.train(training)
    answers = torch.cat(logits)
    return {
        "loss": torch.nn.functional.cross_entropy(answers, test[1]).item(),
        "accuracy": (answers.argmax(1) == test[1]).double().mean().item(),
    }


def peak_memory(device: torch.device) -> float:
    """Peak in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run_cell(options: argparse.Namespace, task: Task, arm: str, seed: int) -> dict[str, Any]:
    """One training run, in this process."""
    kind, settings = ARMS[arm]
    batch = max(1, round(BATCH.get(arm, 1.0) * options.batch))
    steps = int(EPOCHS.get(arm, 1.0) * options.epochs * (len(task.train[0]) // batch))
    arguments = training_arguments(
        options,
        seed,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE.get(arm, 1.0) * options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=round(options.warmup_steps * steps / (options.epochs * (len(task.train[0]) // options.batch))),
        logging_steps=max(1, steps // 32),
    )
    watch, load = Watch(task, options, steps), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        if not issubclass(kind, LGPTrainer):
            args = TrainingArguments(folder, **arguments)
        else:
            args = LGPTrainingArguments(folder, **arguments, lgp_seed=seed, **settings)
        trainer = kind(
            task.model(seed),
            args,
            train_dataset=Positions(len(task.train[0])),
            data_collator=BatchAugmented(*task.train, task.augment),
            callbacks=[watch],
        )
        if args.device.type == "cpu":
            with suppress(OSError):  # Linux can forget what loading the data took; elsewhere the peak may be underrated
                Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory(args.device) if args.device.type == "cpu" else 0.0
        trainer.train()
        peak = peak_memory(args.device) - before
    history = trainer.state.log_history
    log = [{k: v for k, v in e.items() if k in ("step", "loss") or k.startswith("lgp/")} for e in history[:-1]]
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "seconds": watch.clocks[0],
        "process_seconds": watch.clocks[1],
        "first_step_seconds": watch.first_step,
        "final": evaluate(trainer.model, task.test, args.device, options.bf16),
        "peak_memory_mib": peak,
        # Above the number of threads: the machine was shared, and times tell little.
        "load": [load, os.getloadavg()[0]],
        "micro_batches": getattr(trainer, "_lgp_steps", None),
        "curve": watch.curve,
        "log": thinned(log, 32 if arm == "lgp" else 8),  # the figure shows the first
        "last_entry": history[-1],
        "environment": environment(args.device),
    }


def run_all(options: argparse.Namespace) -> None:
    """All cells that the result file lacks, each by this script in a process of its own; then summary and figure."""
    path = options.output / f"{options.name}.json"
    loose = ("data", "output", "cell", "name", "seeds", "arms", "target_epochs")  # may differ between calls
    settings = {name: value for name, value in vars(options).items() if name not in loose}
    cells: list[dict[str, Any]] = []
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise SystemExit(f"{path} holds runs with other settings: choose another --name.")
        cells = stored["cells"]

    def save() -> dict[str, Any]:
        summary = summarise(cells, options.target_epochs, options.epochs, options.batch)
        result = {"settings": settings, "environment": cells[0]["environment"], "summary": summary, "cells": cells}
        write_json(path, result)
        return result

    orders = (options.arms if turn % 2 == 0 else options.arms[::-1] for turn in range(len(options.seeds)))
    wanted = [(arm, seed) for seed, arms in zip(options.seeds, orders, strict=True) for arm in arms]
    wanted = [key for key in wanted if key not in {(cell["arm"], cell["seed"]) for cell in cells}]
    if wanted:
        in_own_processes(options, [("prepare", 0)])
    together = len(options.arms) if options.turns else 1
    while wanted:
        now = [key for key in wanted[:together] if key[1] == wanted[0][1]]
        wanted = wanted[len(now) :]
        fresh = in_own_processes(options, now)
        cells += fresh
        for (arm, seed), cell in zip(now, fresh, strict=True):
            print(f"{arm}, seed {seed}: {cell['seconds']:.1f} s, accuracy {cell['final']['accuracy']:.4f}", flush=True)
        save()
    result = save()
    for arm, figures in result["summary"]["arms"].items():
        print(arm, json.dumps(headline(figures, result["summary"]["primary_target"])), flush=True)
    draw(result, options.output / f"{options.name}.png")


def headline(figures: dict[str, Any], primary: str) -> dict[str, Any]:
    """The few figures of an arm that are worth a line."""
    times = {primary: figures["to_target"][primary], "whole run": figures["total_seconds"]}
    ratios = {f"time, {name}": [time["median_ratio"], time["interval_95"]] for name, time in times.items()}
    final = figures["final_accuracy"]
    return {**ratios, "final accuracy": [final[name] for name in ("mean", "difference", "standard_error")]}


def in_own_processes(options: argparse.Namespace, cells: list[tuple[str, int]]) -> list[Any]:
    """Call this script for each cell, and read what it leaves; the cell ``prepare`` only fills the caches."""
    targets = [cell_file(options, *cell) for cell in cells]
    for target in targets:
        target.unlink(missing_ok=True)
    referee([[sys.executable, *sys.argv, "--cell", arm, str(seed)] for arm, seed in cells])
    return [json.loads(target.read_text(encoding="utf-8")) for target in targets]


def cell_file(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Where one cell's process leaves its result."""
    return scratch_folder(options) / f"{options.name}-{arm}-{seed}.json"


def main_of(options: argparse.Namespace, tasks: dict[str, Callable[[argparse.Namespace], Task]]) -> None:
    """One cell if asked for one, otherwise all of them."""
    if not options.cell:
        run_all(options)
        return
    arm, seed = options.cell
    task = tasks[options.task](options)
    cell = {} if arm == "prepare" else run_cell(options, task, arm, int(seed))
    cell_file(options, arm, int(seed)).write_text(json.dumps(cell), encoding="utf-8")


def argument_parser(description: str, tasks: list[str]) -> argparse.ArgumentParser:
    """The options of this script, and of others that compare arms."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=tasks, default=tasks[0])
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--vit", choices=list(VITS), default="cifar-0.8m")
    parser.add_argument("--images", type=int, default=0, help="number of training images, 0 for all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--scheduler", default="linear")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["trainer", "lgp"])
    parser.add_argument("--eval-points", type=int, default=16, help="evaluations of a run, evenly spaced in steps")
    parser.add_argument("--eval-images", type=int, default=2000, help="test images of the curve; all at the end")
    parser.add_argument("--test-images", type=int, default=0, help="test images in all, 0 for all there are")
    parser.add_argument("--target-epochs", type=float, nargs="+", default=[1, 2, 3], help="the last is the primary one")
    parser.add_argument("--pretrain-epochs", type=int, default=10, help="of task finetune, on the classes known before")
    parser.add_argument("--bf16", action="store_true", help="autocast; float32 otherwise")
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--turns", type=float, default=0.0, help="run the arms of a seed side by side, in turns of so many seconds"
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see whether it runs")
    parser.add_argument("--name", help="name of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser, stem: str) -> argparse.Namespace:
    """The options, at smoke size if so wanted."""
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(
            images=512, batch=64, epochs=3, seeds=[0], eval_points=6, eval_images=200, pretrain_epochs=1
        )
    options = parser.parse_args()
    options.name = options.name or f"{stem}_{options.task.replace('-', '_')}{'_smoke' * options.smoke}"
    return options


def main() -> None:
    tasks = {"scratch": scratch, "finetune": finetune}
    main_of(parsed(argument_parser(__doc__.splitlines()[0], list(tasks)), "time_to_accuracy"), tasks)


if __name__ == "__main__":
    main()
