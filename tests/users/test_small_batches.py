"""A batch of one example has nothing to predict: it is exact, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_same_weights
from tiny import TinyImages, tiny_vit
from transformers import Trainer

from hf_lgp import LGPTrainer


def test_batches_of_one_are_trainers(tmp_path: Path) -> None:
    trained = []
    for base in (Trainer, LGPTrainer):
        args = arguments(tmp_path, base, per_device_train_batch_size=1)
        trained.append(base(tiny_vit(torch.float32), args, train_dataset=TinyImages(8, dtype=torch.float32)))
        trained[-1].train()
    assert trained[1]._lgp_steps == {"exact": 6, "predicted": 0}
    assert_same_weights(trained[1].model, trained[0].model)


@pytest.mark.parametrize(
    ("examples", "fraction", "steps"),
    [(17, 0.5, {"exact": 2, "predicted": 4}), (18, 0.25, {"exact": 0, "predicted": 6}), (18, 0.8, {"exact": 2, "predicted": 4})],
)  # fmt: skip
def test_an_incomplete_last_batch(examples: int, fraction: float, steps: dict[str, int], tmp_path: Path) -> None:
    """The last of three batches of an epoch has one example, or two, of which one is a control example, or both."""
    args: Any = arguments(tmp_path, lgp_control_fraction=fraction)
    trainer = LGPTrainer(tiny_vit(torch.float32), args, train_dataset=TinyImages(examples, dtype=torch.float32))
    trainer.train()
    assert trainer._lgp_steps == steps
