"""Runs of tiny models, and what must hold of every one of them whatever its user does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_lgp.call
from hf_lgp import LGPTrainer, LGPTrainingArguments

Build = Callable[..., Trainer]
"""Makes a trainer from its base class, its arguments and more options: every run gets a model of its own."""


def arguments(folder: Path, base: type[Trainer] = LGPTrainer, **settings: Any) -> Any:
    """Arguments of a short run that saves nothing; half of every batch are control examples unless it is said otherwise."""
    common = {
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if base is LGPTrainer:
        return LGPTrainingArguments(str(folder), **{**common, "lgp_control_fraction": 0.5, **settings})
    own = {name: value for name, value in settings.items() if not name.startswith("lgp_")}
    return TrainingArguments(str(folder), **{**common, **own})


class Gradients(TrainerCallback):
    """Collects the gradients of every optimizer step, by parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def mean(self) -> dict[str, Tensor]:
        """Means over steps."""
        return {name: sum(step[name] for step in self.steps) / len(self.steps) for name in self.steps[0]}


def losses(trainer: Trainer) -> list[float]:
    """What was logged as training loss."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_unbiased(
    build: Build,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float = 1e-9,
    least: float = 1e-3,
    **settings: Any,
) -> LGPTrainer:
    """Train on one batch of four examples, nothing moving: every draw of two control examples comes once.

    The loss of every step must be Trainer's, and the mean of the gradients, too: to a tolerance relative to a tensor's norm, or to a share, ``least``, of
    the largest tensor's.

    Returns:
        The trainer with predictions, after its run.
    """
    draws = [[*draw, *(i for i in range(4) if i not in draw)] for draw in itertools.combinations(range(4), 2)]
    upcoming = itertools.cycle([(torch.tensor(order), torch.tensor(order).argsort()) for order in draws])
    monkeypatch.setattr(hf_lgp.call, "draw_order", lambda *_: next(upcoming))
    still = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "lgp_groups": 1,
        "lgp_single_rows": 1,  # the tiny images' four rows, one by one, would be predicted exactly
        "max_steps": len(draws),
    }
    seen, trainers = [], []
    for base in (Trainer, LGPTrainer):
        seen.append(Gradients())
        trainers.append(build(base, arguments(folder, base, **still, **settings), callbacks=[seen[-1]]))
        trainers[-1].train()
    plain, predicting = trainers
    assert predicting._lgp_steps == {"exact": 0, "predicted": len(draws)}
    assert losses(predicting) == pytest.approx(losses(plain), rel=max(1e-6, tolerance))
    exact, mean = seen[0].mean(), seen[1].mean()
    assert exact.keys() == mean.keys(), exact.keys() ^ mean.keys()
    largest = max(float(g.norm()) for g in exact.values())
    for name, gradient in exact.items():
        off = float((mean[name] - gradient).norm())
        assert off <= tolerance * max(float(gradient.norm()), least * largest), f"{name} is off by {off}"
    single = max(float((seen[1].steps[0][name] - gradient).norm()) for name, gradient in exact.items())
    assert single > max(tolerance, 1e-4) * largest, f"a single draw is an estimate, off by {single / largest}"
    return predicting


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    """Bit for bit."""
    state = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def assert_exact_with_one_warning(
    build: Build, folder: Path, caplog: pytest.LogCaptureFixture, reason: str, **settings: Any
) -> None:
    """A model that cannot be predicted: automatic runs are Trainer's and say why in one line; a fixed fraction is refused."""
    plain = build(Trainer, arguments(folder, Trainer, **settings))
    plain.train()
    automatic = build(LGPTrainer, arguments(folder, **settings, lgp_control_fraction=0.0, lgp_exact_steps=0))
    caplog.clear()
    automatic.train()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "hf_lgp" and r.levelname == "WARNING"]
    assert warning.startswith("LGPTrainer trains this model exactly: ") and reason in warning and "\n" not in warning
    assert losses(automatic) == losses(plain)
    assert automatic._lgp_steps["predicted"] == 0
    assert_same_weights(automatic.model, plain.model)
    with pytest.raises(ValueError, match="cannot be predicted") as refusal:
        build(LGPTrainer, arguments(folder, **settings)).train()
    assert reason in str(refusal.value) and "lgp_control_fraction=1" in str(refusal.value)
