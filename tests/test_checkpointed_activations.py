"""Activation checkpointing: the control examples' blocks are recomputed in the backward, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, TinyTexts, tiny_bert, tiny_classifier
from transformers import TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(family: str, folder: Path, accumulation: int, **settings: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """Gradients of three predicted steps, and the session."""
    seen = Gradients()
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=1 / 3,
        lgp_groups=2,
        lgp_single_rows=1,
        **settings,
    )
    data, model = (
        (TinyTexts(66), tiny_bert().double()) if family == "bert" else (TinyImages(66), tiny_classifier(family))
    )
    trainer = LGPTrainer(
        model.eval(), arguments, train_dataset=data, callbacks=[seen]
    )  # as `from_pretrained` leaves it
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 3 * accumulation}
    assert model.is_gradient_checkpointing == bool(settings)
    return seen.steps, trainer._lgp


CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_gradients_of_predicted_steps_are_those_without_it(family: str, tmp_path: Path) -> None:
    plain, found = (run(family, tmp_path, 2, **settings)[0] for settings in ({}, CHECKPOINTING))
    for expected, step in zip(plain, found, strict=True):
        assert expected.keys() == step.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_measurements_are_those_without_it(tmp_path: Path) -> None:
    """The 33rd micro-batch measures."""
    pairs = []
    for settings in ({}, CHECKPOINTING):
        session = run("vit", tmp_path, 11, **settings)[1]
        pairs.append([spread for reading in session._readings for spread in reading.spreads])
    ((spread,), (other,)) = pairs
    torch.testing.assert_close(other.residual, spread.residual, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(other.total, spread.total, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_reentrant_checkpointing_is_refused_with_what_to_change(fraction: float, tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    arguments = LGPTrainingArguments(str(tmp_path), use_cpu=True, lgp_control_fraction=fraction, **reentrant)
    with pytest.raises(ValueError, match=r"use_reentrant.*lgp_control_fraction=1"):
        LGPTrainer(tiny_classifier("vit"), arguments, train_dataset=TinyImages(8))
