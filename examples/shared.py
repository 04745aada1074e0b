"""What the example scripts share: their command line, columns of classes, resuming, and the report at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import EvalPrediction, HfArgumentParser, Trainer
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from hf_lgp import LGPTrainingArguments

ACCURACY = Path(__file__).parent / "metrics" / "accuracy" / "accuracy.py"


class InputError(ValueError):
    """Something in the command or in the data that the user has to change; the message says what."""


def parse(kinds: Sequence[type[Any]], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Arguments of these dataclasses and of training, from the command line or the JSON file that is its only argument."""
    parser = HfArgumentParser((*kinds, LGPTrainingArguments))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        parsed = parser.parse_json_file(json_file=os.path.abspath(arguments[0]))
    else:
        parsed = parser.parse_args_into_dataclasses(arguments)
    training_args = parsed[-1]
    # An `eval_strategy` alone sets `do_eval`: it says when to evaluate while training.
    if not training_args.do_train and (not training_args.do_eval or training_args.eval_strategy != IntervalStrategy.NO):
        training_args.do_train = training_args.do_eval = True
    return tuple(parsed)


def find_column(rows: Dataset, wanted: str | None, usual: Sequence[str], flag: str, hint: str = "") -> str:
    """The column called ``wanted``, or the first of the ``usual`` names that the rows have.

    Raises:
        InputError: If there is none; the message lists the columns found.
    """
    found = f"The columns found are: {', '.join(rows.column_names)}."
    if wanted:
        if wanted not in rows.column_names:
            raise InputError(f"{flag} {wanted}: the data have no such column. {found}")
        return wanted
    for name in usual:
        if name in rows.column_names:
            return name
    raise InputError(f"The data have no column named {' or '.join(usual)}. {found} Name the right one by {flag}.{hint}")


def class_names(rows: Dataset, column: str) -> list[str]:
    """Names of the classes: those that the data set declares, or else the sorted values of the column.

    Raises:
        InputError: If the column does not hold classes, or only one.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        names = [str(value) for value in sorted(set(rows.select_columns(column)[:][column]) - {None})]
    else:
        raise InputError(
            f"Column `{column}` holds {feature}, not classes. Name the column of labels by --label_column_name."
        )
    if len(names) < 2:
        raise InputError(f"Column `{column}` has {len(names)} class(es): a classifier needs two or more.")
    return names


def class_ids(rows: Dataset, column: str, names: Sequence[str], where: str) -> np.ndarray:
    """Each row's class as an index into ``names``, int64 of shape ``(rows,)``.

    Classes are matched by name: two files may number theirs differently.

    Raises:
        InputError: If a row has no label, or one that ``names`` lacks.
    """
    feature, known = rows.features[column], {name: index for index, name in enumerate(names)}
    result = np.empty(len(rows), dtype=np.int64)
    for row, value in enumerate(rows.select_columns(column)[:][column]):
        if value is None or (isinstance(feature, ClassLabel) and value < 0):
            raise InputError(f"Row {row} of the {where} data has no label in column `{column}`. Remove or label it.")
        name = feature.names[value] if isinstance(feature, ClassLabel) else str(value)
        if name not in known:
            raise InputError(f"Row {row} of the {where} data is of class {name}, which the training data do not have.")
        result[row] = known[name]
    return result


def accuracy(cache_dir: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """``compute_metrics`` of a classifier: the share of examples whose largest logit is their label's."""
    metric = evaluate.load(str(ACCURACY), cache_dir=cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=np.argmax(prediction.predictions, axis=1), references=prediction.label_ids)

    return compute_metrics


def resume_point(training_args: LGPTrainingArguments) -> str | bool | None:
    """What ``Trainer.train`` is to resume from; ``true`` stands for the last checkpoint in the output folder.

    Raises:
        InputError: If there is no such checkpoint.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        if get_last_checkpoint(training_args.output_dir) is None:
            raise InputError(f"--resume_from_checkpoint true: there is no checkpoint in {training_args.output_dir}.")
        return True
    if not Path(wanted).is_dir():
        raise InputError(f"--resume_from_checkpoint {wanted}: there is no such folder.")
    return wanted


def last_readings(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The last value of every ``lgp/`` reading that was logged, by name without that prefix."""
    return {
        name.removeprefix("lgp/"): value
        for entry in history
        for name, value in entry.items()
        if name.startswith("lgp/")
    }


def report(trainer: Trainer, accuracy: float | None, held_out: str) -> None:
    """Print what a user wants to know at the end; ``held_out`` says of how many examples of what."""
    readings = last_readings(trainer.state.log_history)
    fraction = readings.get("fraction", 1.0)
    exact = f"{fraction:g} of every batch at the end" if fraction < 1.0 else "all of every batch at the end"
    print(f"\n  checkpoint              {trainer.args.output_dir}")
    if accuracy is not None:
        print(f"  held-out accuracy       {accuracy:.2%} of {held_out}")
    if trainer.args.do_train:
        print(f"  exact gradients         {exact}")
    if (saved := readings.get("seconds_saved")) is not None:
        print(f"  time saved, estimated   {saved:.0f} s")


def run(
    trainer: Trainer, checkpoint: str | bool | None, task: str, held_out: str, model_args: Any, data_args: Any
) -> dict[str, float]:
    """Train and evaluate as the arguments say, save checkpoint and model card or push them, and report.

    Args:
        trainer: The trainer, with its data.
        checkpoint: What to resume from.
        task: The task's name on the Hub.
        held_out: How many examples of what are held out, for the report.
        model_args: Has ``model_name_or_path``.
        data_args: Has ``dataset_name``.

    Returns:
        All metrics, ``train_*`` and ``eval_*``.
    """
    metrics: dict[str, float] = {}
    if trainer.args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        metrics.update(result.metrics)
    if trainer.args.do_eval:
        evaluated = trainer.evaluate()
        trainer.log_metrics("eval", evaluated)
        trainer.save_metrics("eval", evaluated)
        metrics.update(evaluated)

    card = {
        "finetuned_from": model_args.model_name_or_path,
        "tasks": task,
        "dataset": data_args.dataset_name,
        "tags": [task, *(["vision"] if task == "image-classification" else [])],
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)

    if trainer.is_world_process_zero():
        report(trainer, metrics.get("eval_accuracy"), held_out)
    return metrics
