"""LoRA by ``peft``: only adapters and the head are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Gradients, arguments, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from transformers import Trainer

from hf_lgp import LGPTrainer
from hf_lgp.control.plan import StepPlan

peft = pytest.importorskip("peft")


TARGETS = {"one": ["q_proj"], "other": ["q_proj", "v_proj"]}


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


@pytest.mark.parametrize("fraction", [0.5, 0.0])
def test_an_adapter_that_is_switched_on_later_is_trained(fraction: float, tmp_path: Path) -> None:
    """One on values, in the last block too, where exact steps make them for the first row alone."""
    model = tiny_vit()
    kinds = {
        name: peft.LoraConfig(r=2, target_modules=list(of), init_lora_weights=False) for name, of in TARGETS.items()
    }
    model = peft.get_peft_model(model, kinds["one"], adapter_name="one")
    model.add_adapter("other", kinds["other"])
    model.set_adapter("one")
    model.double()
    settings = {"max_steps": 1, "label_names": ["labels"], "lgp_control_fraction": fraction, "lgp_exact_steps": 0}

    class Switching(LGPTrainer):
        def _lgp_begin(self, *args: Any, **kwargs: Any) -> None:
            super()._lgp_begin(*args, **kwargs)
            model.set_adapter("other")
            self._lgp.plan = lambda *_: StepPlan(first_row=True)  # type: ignore[method-assign, union-attr]

    seen = Gradients()
    trainer = Switching(model, arguments(tmp_path, **settings), train_dataset=TinyImages(8), callbacks=[seen])
    trainer.train()
    values = [g for n, g in seen.steps[0].items() if "layers.1" in n and "v_proj.lora" in n and "other" in n]
    assert trainer._lgp.rules.first_row and len(values) == 2 and all(g.any() for g in values)
