"""What must be plain Trainer's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.control.controller import Controller
from hf_lgp.control.plan import StepPlan


class MeanPooled(nn.Module):
    """Every row of the last block is read: exact steps have no cheaper form than Trainer's."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = tiny_vit(torch.float32, dropout=0.1)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.trunk.classifier(self.trunk.vit(pixel_values).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def run(
    kind: type[Trainer], folder: Path, model: nn.Module | None = None, data: Any = None, **settings: Any
) -> tuple[Any, Tensor]:
    """Train with dropout, accumulation and clipping; return the trainer and the global random stream's next draw."""
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
    trainer = kind(
        model or tiny_vit(torch.float32, dropout=0.1), args, train_dataset=data or TinyImages(50, dtype=torch.float32)
    )
    trainer.train()
    return trainer, torch.rand(3)


def assert_same_run(first: tuple[Any, Tensor], second: tuple[Any, Tensor]) -> None:
    for name, value in first[0].model.state_dict().items():
        assert torch.equal(value, second[0].model.state_dict()[name]), name
    assert torch.equal(first[1], second[1]), "the global random stream differs"
    for before, after in zip(first[0].state.log_history, second[0].state.log_history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "step"):
            assert before.get(key) == after.get(key), key


def test_fraction_one_is_trainer_bit_for_bit(tmp_path: Path) -> None:
    exact = run(LGPTrainer, tmp_path, lgp_control_fraction=1.0)
    assert_same_run(run(Trainer, tmp_path), exact)
    assert exact[0]._lgp is None


def test_exact_steps_of_an_automatic_run_are_trainer_bit_for_bit(tmp_path: Path) -> None:
    """The model is found and verified before the first step, and that must leave no trace either."""
    automatic = run(LGPTrainer, tmp_path, MeanPooled(), lgp_exact_steps=1000)
    assert_same_run(run(Trainer, tmp_path, MeanPooled()), automatic)
    session = automatic[0]._lgp
    assert session.method is not None and session.refused is None, "predictions would have been possible"
    assert session.steps == {"exact": 4 * 13, "predicted": 0}, "four epochs of thirteen micro-batches"


def test_an_automatic_run_that_rests_is_trainer_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controller, "rests", lambda self, rules: self.seen >= 5)
    resting = run(LGPTrainer, tmp_path, MeanPooled(), lgp_exact_steps=1000, save_strategy="steps", save_steps=10)
    assert_same_run(run(Trainer, tmp_path, MeanPooled()), resting)
    session = resting[0]._lgp
    assert session.steps == {"exact": 4 * 13, "predicted": 0} and session.controller.seen == 4 * 13
    assert session.controller.times.count(StepPlan()) == 4, (
        "four of the first five micro-batches were timed, and no other"
    )


def test_exact_steps_that_read_the_first_row_only_are_trainers_to_rounding(tmp_path: Path) -> None:
    """The last block is run on the row that is read in half of the first steps."""
    settings = {"learning_rate": 0.0, "max_steps": 4}
    runs = [run(kind, tmp_path, tiny_vit(), TinyImages(50), **settings) for kind in (Trainer, LGPTrainer)]
    assert runs[1][0]._lgp.rules.first_row and runs[1][0]._lgp.steps["predicted"] == 0
    for key in ("loss", "grad_norm"):
        plain, ours = ([entry[key] for entry in r[0].state.log_history if key in entry] for r in runs)
        assert ours == pytest.approx(plain, rel=1e-6)


def test_total_operations_tell_of_the_saved_backward(tmp_path: Path) -> None:
    plain, exact = run(Trainer, tmp_path)[0], run(LGPTrainer, tmp_path, lgp_control_fraction=1.0)[0]
    half = run(LGPTrainer, tmp_path, lgp_control_fraction=0.5)[0]
    assert plain.state.total_flos == exact.state.total_flos
    assert half.state.total_flos == pytest.approx(2 / 3 * plain.state.total_flos, rel=1e-3)


def test_plain_arguments_work_and_get_the_defaults(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    trainer = LGPTrainer(tiny_vit(torch.float32), args, train_dataset=TinyImages(16, dtype=torch.float32))
    trainer.train()
    assert trainer._lgp_settings.control_fraction == LGPTrainingArguments.lgp_control_fraction
    assert trainer._lgp_steps == {"exact": 2, "predicted": 0}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_loss_is_that_of_the_whole_batch(accumulation: int, tmp_path: Path) -> None:
    """With the parameters held still and no dropout, predicted steps log exactly the losses of plain training."""
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation, "max_steps": 8}
    losses = []
    for kind, own in ((Trainer, {}), (LGPTrainer, {"lgp_control_fraction": 0.5})):
        trainer = run(kind, tmp_path, tiny_vit(), TinyImages(50), **settings, **own)[0]
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert trainer._lgp_steps["predicted"] >= 8
