"""Activation checkpointing: recomputed forwards must neither be noted nor captured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT_FAMILIES, TinyImages, TinyTexts, tiny_model

from hf_lgp import LGPTrainer, LGPTrainingArguments


def trained(family: str, folder: Path, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=1 / 3,
        lgp_warmup_examples=24,
        lgp_window=36,
        lgp_rank=3,
        lgp_refit_steps=2,
        lgp_basis_steps=4,
        **settings,
    )
    data = (TinyTexts if family in TEXT_FAMILIES else TinyImages)(60)
    trainer = LGPTrainer(tiny_model(family), arguments, train_dataset=data)
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]
    trainer.train()
    return trainer


# With reentrant checkpointing the layer scales of BEiT, which belong to its blocks, have no predictions.
@pytest.mark.parametrize(
    ("family", "reentrant"),
    [*((family, kind) for family in ("vit", "dinov2", "bert", "swin") for kind in (False, True)), ("beit", False)],
)
def test_trajectory_and_predictor_are_those_without_checkpointing(family: str, reentrant: bool, tmp_path: Path) -> None:
    plain = trained(family, tmp_path)
    recomputing = trained(
        family,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert recomputing._lgp_steps == plain._lgp_steps and plain._lgp_steps["predicted"] > 15
    assert plain._lgp_engine is not None and recomputing._lgp_engine is not None
    assert recomputing._lgp_engine.observer.capture.reached == plain._lgp_engine.observer.capture.reached
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(recomputing.model.state_dict()[name], value, rtol=1e-6, atol=1e-9, msg=name)
    expected, found = (trainer._lgp_engine.predictor.alignment.coefficients for trainer in (plain, recomputing))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)  # rounding, divided by small variances
    for trainer in (plain, recomputing):
        trainer._lgp_engine.close()
