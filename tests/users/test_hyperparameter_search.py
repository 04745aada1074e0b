"""Settings that change between the trials of one trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def trainer_for(folder: Path) -> LGPTrainer:
    data = TinyImages(32, dtype=torch.float32)
    return LGPTrainer(
        None,
        arguments(folder, eval_strategy="epoch", max_steps=4),
        train_dataset=data,
        eval_dataset=data,
        model_init=lambda: tiny_vit(torch.float32),
    )


def search(trainer: LGPTrainer, values: list[float], objective: Any = None) -> None:
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"lgp_control_fraction": trial.suggest_categorical("lgp_control_fraction", values)},
        compute_objective=objective or (lambda metrics: metrics["eval_loss"]),
        n_trials=len(values),
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"lgp_control_fraction": values}, seed=0),
    )


def test_every_trial_is_trained_with_its_own_settings(tmp_path: Path) -> None:
    trainer, trials = trainer_for(tmp_path), {}

    def objective(metrics: dict[str, float]) -> float:
        session = trainer._lgp
        used = 1.0 if session is None else session.settings.control_fraction
        assert used == trainer.args.lgp_control_fraction == trainer._lgp_settings.control_fraction
        trials[used] = dict(trainer._lgp_steps)
        return metrics["eval_loss"]

    search(trainer, [0.25, 1.0, 0.5], objective)
    predicted = {"exact": 0, "predicted": 4}
    assert trials == {0.25: predicted, 0.5: predicted, 1.0: {"exact": 0, "predicted": 0}}


def test_a_trial_with_a_bad_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`lgp_control_fraction` must lie in \[0, 1\], got 1.5"):
        search(trainer_for(tmp_path), [1.5])
