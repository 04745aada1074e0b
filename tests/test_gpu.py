"""What only a GPU can show: no synchronisation on the training path, loss scaling, mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments

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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_predicts(precision: str, tmp_path: Path) -> None:
    trainer = trained(LGPTrainer, tmp_path, **{precision: True})
    assert trainer._lgp_steps["predicted"] == 80
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
