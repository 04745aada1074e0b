"""bf16 and fp16 autocast, here on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from transformers import Trainer, ViTForImageClassification

from hf_lgp import LGPTrainer
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import row_walk
from hf_lgp.rows.walk import RowBudget


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


def gradients(half: torch.dtype | None, plan: StepPlan, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of a step of a tiny model under autocast, by the scaled loss."""
    model, batch = tiny_vit(torch.float32, num_hidden_layers=3), TinyImages(16, dtype=torch.float32).batch(0, 16)

    def loss(count: int) -> torch.Tensor:
        with torch.autocast("cpu", half, enabled=half is not None):
            return model(**{name: value[:count] for name, value in batch.items()}).loss

    method = row_walk(model.train(), loss, 4, RowBudget(1, 1), intercepted_attention, half is not None)
    with method.splice(plan, lambda _: None):
        (scale * loss(16)).backward()
    return {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("measure", [0, 4])
def test_half_precision_gives_float32s_estimate_to_its_rounding(half: torch.dtype, measure: int) -> None:
    plan = StepPlan(0.25, measure=measure, first_row=True, seed=1)
    found, expected = (gradients(kind, plan, scale=2.0**10) for kind in (half, None))
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        off = float((found[name] - gradient).norm())
        assert off <= 0.1 * max(float(gradient.norm()), 0.05 * largest), f"{name} is off by {off}"


def test_an_overflow_in_fp16_is_left_for_the_scaler_to_see() -> None:
    found = gradients(torch.float16, StepPlan(0.25, first_row=True, seed=1), scale=1e6)
    inside = [g for name, g in found.items() if ".layers.0" in name]
    assert inside and not any(bool(g.isfinite().all()) for g in inside)
