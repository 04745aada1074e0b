"""What a step with predictions is worth, in exact examples: test loss step for step against plain training at smaller batches.

Plain ``Trainer`` at several batch sizes and ``LGPTrainer`` at the largest of them train the same ViT on CIFAR-10 for the
same number of steps at the same constant learning rate, from the same weights. If ``LGPTrainer`` at batch 128 and fraction
1/4 is level with ``Trainer`` at batch 96, its 32 exact and 96 predicted examples are worth 96 exact ones. Every finished
run is saved at once, and a second call continues where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, VITS, Augmented, build_vit, environment, load_cifar, write_json
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments


class TestLoss(TrainerCallback):
    """Evaluates at the given steps and leaves the random streams as they were."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, steps: list[int]) -> None:
        self.pixels, self.labels, self.steps = images.float() / 127.5 - 1.0, labels, steps
        self.readings: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step not in self.steps:
            return
        training = model.training
        model.eval()
        logits = torch.cat([model(pixel_values=p.to(args.device)).logits.float() for p in self.pixels.split(500)])
        model.train(training)
        labels = self.labels.to(args.device)
        self.readings[str(state.global_step)] = {
            "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }


def run(options: argparse.Namespace, batch: int, fraction: float, seed: int, data: Any, test: Any) -> dict[str, Any]:
    """One training run."""
    shared = dict(
        per_device_train_batch_size=batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        seed=seed,
        bf16=options.bf16,
        use_cpu=options.cpu,
        report_to="none",
        save_strategy="no",
        logging_steps=60,
        disable_tqdm=True,
    )
    callback = TestLoss(*test, steps=[options.steps * part // 4 for part in (1, 2, 3, 4)])
    with tempfile.TemporaryDirectory() as folder:
        if fraction < 1.0:
            arguments = LGPTrainingArguments(folder, **shared, lgp_control_fraction=fraction)
            trainer: Trainer = LGPTrainer(
                build_vit(options.vit, seed=seed), arguments, train_dataset=data, callbacks=[callback]
            )
        else:
            plain = TrainingArguments(folder, **shared)
            trainer = Trainer(build_vit(options.vit, seed=seed), plain, train_dataset=data, callbacks=[callback])
        result = trainer.train()
    return {
        "batch": batch,
        "fraction": fraction,
        "seed": seed,
        "test": callback.readings,
        "train_loss": [float(e["loss"]) for e in trainer.state.log_history if "loss" in e],
        "seconds": result.metrics["train_runtime"],
        "environment": environment(trainer.args.device),
    }


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the difference to plain training at the same seed, by kind of run and step."""
    rows = []
    for batch, fraction in dict.fromkeys((cell["batch"], cell["fraction"]) for cell in cells):
        mine = [cell for cell in cells if (cell["batch"], cell["fraction"]) == (batch, fraction)]
        for step in mine[0]["test"]:
            losses = [cell["test"][step]["loss"] for cell in mine]
            rows.append(
                {
                    "batch": batch,
                    "fraction": fraction,
                    "step": int(step),
                    "seeds": len(losses),
                    "loss": statistics.fmean(losses),
                    "standard_error": statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
                    "accuracy": statistics.fmean(cell["test"][step]["accuracy"] for cell in mine),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet and test.parquet"
    )
    parser.add_argument("--vit", choices=list(VITS), default="cifar-0.8m")
    parser.add_argument("--steps", type=int, default=720)
    parser.add_argument("--batches", type=int, nargs="+", default=[96, 128, 64, 32], help="of plain training")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--name", default="worth", help="name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.output / f"{options.name}.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.is_file() else []
    data = Augmented(*load_cifar(options.data, "train"))
    test = load_cifar(options.data, "test")
    kinds = [(max(options.batches), options.fraction), *((batch, 1.0) for batch in options.batches)]
    # The two kinds of run that are compared come first, for all seeds.
    wanted = [(*kind, seed) for part in (kinds[:2], kinds[2:]) for seed in options.seeds for kind in part]
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("data", "output")
    }
    for batch, fraction, seed in wanted:
        if any((cell["batch"], cell["fraction"], cell["seed"]) == (batch, fraction, seed) for cell in cells):
            continue
        cells.append(run(options, batch, fraction, seed, data, test))
        print({key: cells[-1][key] for key in ("batch", "fraction", "seed", "test", "seconds")}, flush=True)
        write_json(path, {"settings": settings, "summary": summarise(cells), "cells": cells})
    for row in summarise(cells):
        print(row, flush=True)


if __name__ == "__main__":
    main()
