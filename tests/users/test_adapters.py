"""LoRA by ``peft``: only adapters and the head are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import arguments, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from transformers import Trainer

from hf_lgp import LGPTrainer

peft = pytest.importorskip("peft")


def adapted() -> Any:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    )
    return peft.get_peft_model(tiny_vit(), config).double()


def test_the_adapters_gradient_is_unbiased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
        return base(adapted(), args, train_dataset=TinyImages(4), **options)

    trainer = assert_unbiased(build, tmp_path, monkeypatch, label_names=["labels"])
    assert all("lora" in n or "classifier" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_adapters_are_trained_and_nothing_else(tmp_path: Path) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = LGPTrainer(model, arguments(tmp_path, label_names=["labels"]), train_dataset=TinyImages(8))
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 6} and losses(trainer)[-1] < losses(trainer)[0]
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
