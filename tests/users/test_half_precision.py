"""bf16 autocast, here on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from transformers import Trainer, ViTForImageClassification

from hf_lgp import LGPTrainer


class Watching(ViTForImageClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        return super().forward(*args, **kwargs)


def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    known = tiny_vit(torch.float32)
    model = Watching(known.config)
    model.load_state_dict(known.state_dict())
    options["compute_loss_func"] = lambda out, labels, **_: torch.nn.functional.cross_entropy(out.logits, labels)
    return base(model, args, train_dataset=TinyImages(4, dtype=torch.float32), **options)


def test_the_gradient_is_unbiased_to_bf16s_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys' biases, which have no gradient, have noise for one."""
    options = {"bf16": True, "label_names": ["labels"], "remove_unused_columns": False}
    assert_unbiased(build, tmp_path, monkeypatch, tolerance=0.05, least=1e-2, **options)


def test_it_learns(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        bf16=True,
        label_names=["labels"],
        remove_unused_columns=False,
        max_steps=20,
        per_device_train_batch_size=4,
    )
    trainer = build(LGPTrainer, args)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 20}
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert all(p.dtype is torch.float32 and p.isfinite().all() for p in trainer.model.parameters())
