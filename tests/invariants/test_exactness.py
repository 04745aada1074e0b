"""What must be plain Trainer's, bit for bit, and trajectories that must not depend on how they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments


def run(kind: type[Trainer], folder: Path, **settings: Any) -> tuple[Trainer, Tensor]:
    """Train a tiny ViT with dropout; return the trainer and the global random stream's next draw."""
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 20,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    args = LGPTrainingArguments(**arguments) if kind is LGPTrainer else TrainingArguments(**arguments)
    trainer = kind(tiny_vit(torch.float32, dropout=0.1), args, train_dataset=TinyImages(50, dtype=torch.float32))
    trainer.train()
    return trainer, torch.rand(3)


def assert_same_run(first: tuple[Trainer, Tensor], second: tuple[Trainer, Tensor], steps: int | None = None) -> None:
    for name, value in first[0].model.state_dict().items():
        assert torch.equal(value, second[0].model.state_dict()[name]), name
    assert torch.equal(first[1], second[1]), "the global random stream differs"
    for before, after in zip(first[0].state.log_history, second[0].state.log_history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "step"):
            assert before.get(key) == after.get(key), key


def test_fraction_one_is_trainer_bit_for_bit(tmp_path: Path) -> None:
    plain = run(Trainer, tmp_path)
    assert_same_run(plain, run(LGPTrainer, tmp_path, lgp_control_fraction=1.0))


def test_observing_exact_steps_is_trainer_bit_for_bit(tmp_path: Path) -> None:
    """Steps before the first prediction carry every hook and must still change nothing."""
    plain = run(Trainer, tmp_path)
    warming = run(LGPTrainer, tmp_path, lgp_warmup_examples=2048, lgp_observe_examples=2)
    assert warming[0]._lgp_steps["exact"] > 50 and warming[0]._lgp_steps["predicted"] == 0
    assert_same_run(plain, warming)


def test_float_and_total_operations_tell_of_the_saved_backward(tmp_path: Path) -> None:
    plain, exact = run(Trainer, tmp_path)[0], run(LGPTrainer, tmp_path, lgp_control_fraction=1.0)[0]
    half = run(LGPTrainer, tmp_path, lgp_control_fraction=0.5, lgp_warmup_examples=8, lgp_refit_steps=1)[0]
    assert plain.state.total_flos == exact.state.total_flos
    assert 2 / 3 < half.state.total_flos / plain.state.total_flos < 0.8


def test_plain_arguments_work_and_get_the_defaults(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    trainer = LGPTrainer(tiny_vit(torch.float32), args, train_dataset=TinyImages(16, dtype=torch.float32))
    trainer.train()
    assert trainer._lgp_settings.control_fraction == LGPTrainingArguments.lgp_control_fraction
    assert trainer._lgp_steps["exact"] == 2


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_loss_is_that_of_the_whole_batch(accumulation: int, tmp_path: Path) -> None:
    """With the parameters held still and no dropout, predicted steps log exactly the losses of plain training."""
    losses = []
    for kind in (Trainer, LGPTrainer):
        settings: dict[str, Any] = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation, "max_steps": 12}
        if kind is LGPTrainer:
            settings.update(lgp_warmup_examples=8, lgp_refit_steps=1, lgp_control_fraction=0.5)
        args = (LGPTrainingArguments if kind is LGPTrainer else TrainingArguments)(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=4, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = kind(tiny_vit(), args, train_dataset=TinyImages(50))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert trainer._lgp_steps["predicted"] >= 8
