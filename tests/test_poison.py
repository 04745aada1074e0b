"""NaN and Inf in predictions, the path's notes and captured gradients reach neither the optimizer nor the predictor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch import Tensor

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.capture import Capture
from hf_lgp.class_path import ClassPath
from hf_lgp.predictor import GradientPredictor

STEPS, POISONED = 24, 13

values = pytest.mark.parametrize("value", [math.nan, math.inf])


class Stepping(LGPTrainer):
    """Poisons one step, and keeps what reaches the optimizer in every step."""

    poison: Any = staticmethod(lambda: None)
    heal: Any = staticmethod(lambda: None)

    def training_step(self, model: Any, *args: Any) -> Tensor:
        if self.state.global_step == POISONED:
            self.poison()
        try:
            return super().training_step(model, *args)
        finally:
            if self.state.global_step == POISONED:
                self.heal()


def trainer_for(folder: Path) -> Stepping:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=0.25,
        lgp_warmup_examples=16,
        lgp_window=32,
        lgp_rank=3,
        lgp_observe_steps=1,
        lgp_refit_steps=2,
        lgp_basis_steps=1,
    )
    return Stepping(tiny_vit(torch.float32), arguments, train_dataset=TinyImages(64, dtype=torch.float32))


def assert_unharmed(trainer: Stepping, nonfinite: int) -> None:
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS and logs[-1]["lgp_exact_share"] < 0.3
    for entry in logs:
        assert all(math.isfinite(value) for value in entry.values()), entry
    assert logs[-1]["lgp_nonfinite"] == nonfinite
    assert 0 < logs[-1]["lgp_rho2"] <= 1 and logs[-1]["lgp_alpha_path"] > 0


@values
def test_predictions(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lgp.plans.RIDGE_COST", 0.0)  # the regression is used beside the path, whatever it gains
    trainer, predict = trainer_for(tmp_path), GradientPredictor.predict

    def poisoned(self: GradientPredictor, rows: Tensor) -> Tensor:
        predicted = predict(self, rows)
        predicted[:, 3] = value
        return predicted

    trainer.poison = lambda: monkeypatch.setattr(GradientPredictor, "predict", poisoned)
    trainer.heal = lambda: monkeypatch.setattr(GradientPredictor, "predict", predict)
    trainer.train()
    assert_unharmed(trainer, nonfinite=1)


@values
@pytest.mark.parametrize("name", ["rows", "class", "spread"])
@pytest.mark.parametrize("example", [0, -1], ids=["control", "prediction"])
def test_notes_of_the_path(
    name: str, example: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, gradients = trainer_for(tmp_path), ClassPath.gradients

    def poisoned(self: ClassPath, pullbacks: Tensor) -> Any:
        self._kept[name, 1][example] = value
        return gradients(self, pullbacks)

    trainer.poison = lambda: monkeypatch.setattr(ClassPath, "gradients", poisoned)
    trainer.heal = lambda: monkeypatch.setattr(ClassPath, "gradients", gradients)
    trainer.train()
    assert_unharmed(trainer, nonfinite=1)


@values
def test_captured_gradients(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, take = trainer_for(tmp_path), Capture._take

    def poisoned(self: Capture, position: int, inputs: Tensor, delta: Tensor, coordinates: Tensor) -> None:
        take(self, position, inputs, torch.full_like(delta, value) if position == 4 else delta, coordinates)

    trainer.poison = lambda: monkeypatch.setattr(Capture, "_take", poisoned)
    trainer.heal = lambda: monkeypatch.setattr(Capture, "_take", take)
    trainer.train()
    assert_unharmed(trainer, nonfinite=0)


def test_a_step_with_poisoned_predictions_has_the_control_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remains of such a step is unbiased: the mean gradient of its control examples, and the head's exact one."""
    trainer = trainer_for(tmp_path)
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]
    trainer.train()
    engine, batch = trainer._lgp_engine, TinyImages(8, dtype=torch.float32).batch(0, 8)
    assert engine is not None
    chosen: list[Tensor] = []
    spliced = engine.spliced
    monkeypatch.setattr(
        engine,
        "spliced",
        lambda order, controls, weight: chosen.append(order[:controls]) or spliced(order, controls, weight),
    )
    monkeypatch.setattr(
        engine.predictor, "predict", lambda rows: rows.new_full((len(rows), engine.predictor.subspace.size), math.nan)
    )
    monkeypatch.setattr(engine.path, "gradients", lambda pullbacks: [None] * len(engine.rules))
    gradients = []
    for step, inputs in ((LGPTrainer.training_step, batch), (LGPTrainer.__mro__[1].training_step, None)):
        part = inputs or {name: value[chosen[0]] for name, value in batch.items()}
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1
        step(trainer, trainer.model, dict(part), torch.tensor(len(part["labels"])))
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    for name, value in gradients[0].items():
        if "classifier" not in name:
            torch.testing.assert_close(value, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    engine.close()
