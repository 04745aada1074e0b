"""What surrounds a step is plain Trainer's also when steps are predicted: data, callbacks, metrics, random streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Journal(TrainerCallback):
    """Writes down every event with the step at which it happened."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float | None]] = []


def _noted(name: str) -> Any:
    def note(self: Journal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append((name, state.global_step, state.epoch))

    return note


for _event in EVENTS:
    setattr(Journal, _event, _noted(_event))


class Watched(TinyImages):
    """Writes down which examples were asked for, in order."""

    def __init__(self, count: int) -> None:
        super().__init__(count, dtype=torch.float32)
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        return super().__getitem__(index)


def accuracy(evaluation: Any) -> dict[str, float]:
    return {"accuracy": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean())}


def run(kind: type[Trainer], folder: Path, learning_rate: float, dropout: float) -> dict[str, Any]:
    journal, data, held_out = Journal(), Watched(52), Watched(20)
    settings: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": learning_rate,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if kind is LGPTrainer:
        arguments: TrainingArguments = LGPTrainingArguments(str(folder), **settings, lgp_control_fraction=0.5)
    else:
        arguments = TrainingArguments(str(folder), **settings)
    trainer = kind(
        tiny_vit(torch.float32, dropout=dropout),
        arguments,
        train_dataset=data,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        callbacks=[journal, EarlyStoppingCallback(early_stopping_patience=50)],
    )
    trainer.train()
    if kind is LGPTrainer:
        assert trainer._lgp_steps["predicted"] > 30
    stream = torch.rand(3), np.random.rand(3)
    return {
        "events": journal.events,
        "asked": data.asked,
        "evaluated": held_out.asked,
        "stream": stream,
        "metrics": trainer.evaluate(),
        "prediction": trainer.predict(held_out),
        "log keys": [sorted(key for key in entry if not key.startswith("lgp/")) for entry in trainer.state.log_history],
        "files": sorted(
            path.name for path in (folder / "checkpoint-10").iterdir() if not path.name.startswith("lgp_state")
        ),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_data_callbacks_logs_and_files_are_those_of_trainer(dropout: float, tmp_path: Path) -> None:
    plain = run(Trainer, tmp_path / "plain", 1e-2, dropout)
    predicted = run(LGPTrainer, tmp_path / "predicted", 1e-2, dropout)
    assert len(plain["events"]) > 100 and len(plain["asked"]) == 3 * 52
    for name in ("events", "asked", "evaluated", "log keys", "files"):
        assert plain[name] == predicted[name], name


def test_metrics_and_random_streams_are_those_of_trainer(tmp_path: Path) -> None:
    """The parameters are held still, so that both evaluate the same model."""
    plain = run(Trainer, tmp_path / "plain", 0.0, 0.0)
    predicted = run(LGPTrainer, tmp_path / "predicted", 0.0, 0.0)
    for one, other in zip(plain["stream"], predicted["stream"], strict=True):
        assert (one == other).all()
    for name in ("eval_loss", "eval_accuracy"):
        assert plain["metrics"][name] == predicted["metrics"][name]
    assert plain["metrics"].keys() == predicted["metrics"].keys()
    assert (plain["prediction"].predictions == predicted["prediction"].predictions).all()
    assert (plain["prediction"].label_ids == predicted["prediction"].label_ids).all()
    assert plain["prediction"].metrics.keys() == predicted["prediction"].metrics.keys()


def test_one_batch_of_eight_is_two_accumulated_batches_of_four_at_fraction_one(tmp_path: Path) -> None:
    """The sums are the same in another order: float64 keeps some fourteen digits of them over twenty steps."""
    trained = []
    for batch, accumulation in ((8, 1), (4, 2)):
        arguments = LGPTrainingArguments(
            str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=20,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            lgp_control_fraction=1.0,
        )
        trainer = LGPTrainer(tiny_vit(), arguments, train_dataset=TinyImages(64))
        trainer.train()
        trained.append(trainer)
    one, other = trained
    for name, value in one.model.state_dict().items():
        # Keys' biases have no gradient but rounding, which Adam scales to full steps.
        if "k_proj.bias" not in name:
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trained]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
