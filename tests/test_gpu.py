"""What only a GPU can show: no synchronisation on the training path, loss scaling, mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def gpu_trainer(folder: Path, steps: int = 30, count: int = 512, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        max_steps=steps,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=5,
        dataloader_pin_memory=True,
        **{
            "lgp_control_fraction": 0.25,
            "lgp_observe_steps": 2,
            "lgp_warmup_examples": 64,
            "lgp_window": 128,
            "lgp_rank": 4,
            "lgp_refit_steps": 3,
            "lgp_basis_steps": 5,
            **settings,
        },
    )
    return LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=TinyImages(count, dtype=torch.float32))


class NoSync(LGPTrainer):
    """Raises where a training step waits for the device."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        built = self._lgp_engine is not None  # finding the head compares tensors, once
        torch.cuda.set_sync_debug_mode("error" if built else "default")
        try:
            return super().training_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("fraction", [0.25, 0.0])
def test_a_training_step_never_synchronises(kernel: str, fraction: float, tmp_path: Path) -> None:
    trainer = gpu_trainer(tmp_path, steps=120, lgp_kernel=kernel, lgp_control_fraction=fraction)
    trainer.__class__ = NoSync
    trainer.train()
    assert trainer._lgp_steps["predicted"] > 10 or fraction == 0.0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_with_finite_predictions(precision: str, tmp_path: Path) -> None:
    trainer = gpu_trainer(tmp_path, steps=60, **{precision: True})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["lgp_nonfinite"] == 0 and logs[-1]["lgp_exact_share"] < 0.5
    assert logs[-1]["lgp_rho2"] > 0.1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_loss_scaling_does_not_change_the_predictor(tmp_path: Path) -> None:
    """Window entries are kept in units of one example's own loss, whatever the scaler multiplies it by."""
    norms = []
    for precision in ({}, {"fp16": True}):
        trainer = gpu_trainer(tmp_path, steps=6, **precision)
        trainer._lgp_close = lambda: None  # type: ignore[method-assign]
        trainer.train()
        predictor = trainer._lgp_engine.predictor
        predictor.refit()
        norms.append((predictor._pullbacks[:64].norm().item(), predictor._coordinates[:64].norm().item()))
        trainer._lgp_engine.close()
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_captured_and_predicted_gradients_agree_with_the_cpu(tmp_path: Path) -> None:
    gradients = []
    for use_cpu in (True, False):
        trainer = gpu_trainer(tmp_path, steps=12, use_cpu=use_cpu, learning_rate=0.0, max_grad_norm=0.0)
        trainer._lgp_close = lambda: None  # type: ignore[method-assign]
        trainer.train()
        assert trainer._lgp_engine.predictor.ready
        trainer.model.zero_grad()
        batch = TinyImages(512, dtype=torch.float32).batch(0, 16)
        LGPTrainer.training_step(trainer, trainer.model, batch, torch.tensor(16, device=trainer.args.device))
        gradients.append([p.grad.cpu() for p in trainer.model.parameters()])
        trainer._lgp_engine.close()
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=5e-2, atol=5e-3)
