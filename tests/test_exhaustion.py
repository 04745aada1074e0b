"""Memory that runs out in the predictor: training goes on exactly, with one warning and nothing left behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, hooks_of, tiny_vit

import hf_lgp.capture
import hf_lgp.engine
import hf_lgp.subspace
from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.class_path import ClassPath
from hf_lgp.exhaustion import Exhaustion, is_exhaustion
from hf_lgp.prediction_pass import PredictionPass
from hf_lgp.predictor import GradientPredictor

HUGE = 2**46


def exhaust(*_: Any, **__: Any) -> Any:
    """Ask for more memory than any machine has."""
    return torch.empty(HUGE, dtype=torch.float64)


def trainer_for(folder: Path, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=0.25,
        lgp_observe_steps=2,
        lgp_warmup_examples=16,
        lgp_window=32,
        lgp_rank=3,
        lgp_refit_steps=2,
        lgp_basis_steps=4,
        **settings,
    )
    return LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=TinyImages(64, dtype=torch.float32))


def test_exhausted_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        exhaust()
    assert is_exhaustion(caught.value) and is_exhaustion(MemoryError()) and is_exhaustion(torch.OutOfMemoryError())
    assert not is_exhaustion(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_exhaustion(ValueError("out of memory"))
    exhaustion = Exhaustion()
    with exhaustion.noted():
        exhaust()
    assert exhaustion.error is not None and exhaustion.error.__traceback__ is None
    with pytest.raises(ValueError, match="other"), exhaustion.noted():
        raise ValueError("other")


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (GradientPredictor, "__init__", 0),
        (PredictionPass, "features", 3),  # after the two checks at the start
        (GradientPredictor, "kernel_rows", 0),
        (ClassPath, "gradients", 8),
        (hf_lgp.capture.Capture, "_take", 150),
        (GradientPredictor, "observe", 5),
        (GradientPredictor, "refit", 2),
        (GradientPredictor, "move_bases", 9),
    ],
)
def test_training_goes_on_exactly(
    owner: Any, name: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("hf_lgp").propagate = True
    work, done = getattr(owner, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        return exhaust() if done[0] > calls else work(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    trainer = trainer_for(tmp_path)
    hooks = hooks_of(trainer.model)
    with caplog.at_level("WARNING"):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert len(messages) == 1 and "lgp_window" in messages[0], "one warning, and it says what to change"
    assert done[0] == calls + 1, "it is not tried again"
    assert trainer.state.global_step == 10 and sum(trainer._lgp_steps.values()) == 20
    assert trainer._lgp_steps["exact"] >= 2 and hooks_of(trainer.model) == hooks
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_the_step_in_which_a_hook_fails_keeps_its_exact_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everything is exact anyway, failing to observe changes nothing at all."""
    settings = {"lgp_warmup_examples": 32, "max_steps": 2}
    trained = []
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(hf_lgp.capture.Capture, "_take", exhaust)
        trainer = trainer_for(tmp_path)
        trainer.args.max_steps, trainer.args.lgp_warmup_examples = (
            settings["max_steps"],
            settings["lgp_warmup_examples"],
        )
        trainer.train()
        assert trainer._lgp_steps == {"exact": 4, "predicted": 0}
        trained.append(trainer.model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_a_model_that_is_too_large_by_itself_is_not_our_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(type(trainer.model.vit), "forward", exhaust)
    with pytest.raises(RuntimeError, match="allocate memory"):
        trainer.train()
