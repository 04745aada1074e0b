"""What only a GPU can show: its gradients are the CPU's, no synchronisation on the training path, loss scaling, compiled blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import row_walk
from hf_lgp.rows.compiled import Compiled
from hf_lgp.rows.leaves import Run, run_eagerly
from hf_lgp.rows.walk import RowBudget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class NoSync(LGPTrainer):
    """Raises where a training step waits for the device, once the model was checked."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        checked = self._lgp is not None and self._lgp.method is not None
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            return super().training_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def trained(kind: type[LGPTrainer], folder: Path, **settings: Any) -> LGPTrainer:
    defaults = {"lgp_control_fraction": 0.25, "max_steps": 80, "logging_steps": 20}
    args = LGPTrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{**defaults, **settings},
    )
    trainer = kind(tiny_vit(torch.float32), args, train_dataset=TinyImages(512, dtype=torch.float32))
    trainer.train()
    return trainer


@pytest.mark.parametrize("fraction", [0.25, 0.0])
def test_a_training_step_never_synchronises(fraction: float, tmp_path: Path) -> None:
    trained(NoSync, tmp_path, lgp_control_fraction=fraction, lgp_exact_steps=20)


def gradients(device: str, plan: StepPlan, run: Run = run_eagerly) -> dict[str, torch.Tensor]:
    """Of a step, once everything that is to be compiled was; the draw of control examples is the same on all devices."""
    model, batch = tiny_vit(torch.float32, num_hidden_layers=3), TinyImages(16, dtype=torch.float32).batch(0, 16)
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}

    def loss(count: int) -> torch.Tensor:
        return model(**{name: value[:count] for name, value in batch.items()}).loss

    method = row_walk(model.train(), loss, 4, RowBudget(1, 1), intercepted_attention, False, run)
    for _ in range(10):
        model.zero_grad()
        with method.splice(plan, lambda _: None):
            loss(16).backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n}


PLANS = [StepPlan(0.25, first_row=True, seed=1), StepPlan(0.5, measure=4, seed=2), StepPlan(first_row=True)]


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_the_cpus(plan: StepPlan) -> None:
    torch.testing.assert_close(gradients("cuda", plan), gradients("cpu", plan), rtol=1e-2, atol=1e-4)


def test_compiled_blocks_give_the_same_gradients() -> None:
    run = Compiled("inductor")
    torch.testing.assert_close(gradients("cuda", PLANS[0], run), gradients("cuda", PLANS[0]), rtol=1e-2, atol=1e-4)
    assert run.graphs == {"others": 1, "control": 1, "walk of 3 rows": 1}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_predicts(precision: str, tmp_path: Path) -> None:
    trainer = trained(LGPTrainer, tmp_path, **{precision: True})
    assert trainer._lgp_steps["predicted"] == 80
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
