"""``auto_find_batch_size``: memory runs out, and a run starts anew with smaller batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments
from tiny import TinyImages, tiny_vit
from torch import Tensor, nn

from hf_lgp import LGPTrainer


class Limited(nn.Module):
    """Runs out of memory for batches of more than 14 examples, or in one call."""

    def __init__(self, failing_call: int = 0) -> None:
        super().__init__()
        self.body, self.calls, self.failing_call = tiny_vit(torch.float32), 0, failing_call

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        if self.calls == self.failing_call or (not self.failing_call and len(pixel_values) > 14):
            raise RuntimeError("CUDA out of memory.")
        return self.body(pixel_values=pixel_values, labels=labels)


@pytest.mark.parametrize("failing_call", [0, 3, 14])
def test_every_step_of_the_smaller_batches_is_predicted(failing_call: int, tmp_path: Path) -> None:
    """Memory runs out in training, in the check of the model (the third call of it), or later."""
    args = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=8)
    model = Limited(failing_call)
    trainer = LGPTrainer(model, args, train_dataset=TinyImages(64, dtype=torch.float32))
    trainer.train()
    assert trainer._train_batch_size < 16 and trainer.state.global_step == 8
    assert trainer._lgp_steps == {"exact": 0, "predicted": 8}
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.training


def test_memory_that_runs_out_in_the_check_is_no_end_of_an_automatic_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, lgp_control_fraction=0.0)
    trainer = LGPTrainer(Limited(failing_call=3), args, train_dataset=TinyImages(64, dtype=torch.float32))
    trainer.train()
    assert trainer._lgp_steps == {"exact": 6, "predicted": 0}
    assert "memory ran out in its check" in caplog.text
