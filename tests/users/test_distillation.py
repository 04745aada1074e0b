"""A teacher inside ``compute_loss`` that sees the whole batch, as students' outputs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import arguments, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import Trainer

from hf_lgp import LGPTrainer


def distilling(base: type[Trainer]) -> Any:
    class Distilling(base):  # type: ignore[misc, valid-type]
        teacher = tiny_vit(hidden_size=12).eval()
        shapes: list[tuple[int, int]] = []

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                known = self.teacher(**inputs).logits
            self.shapes.append((len(outputs.logits), len(known)))
            apart = F.kl_div(outputs.logits.log_softmax(-1), known.softmax(-1), reduction="batchmean")
            loss: Tensor = F.cross_entropy(outputs.logits, labels) + 2.0 * apart
            return (loss, outputs) if return_outputs else loss

    return Distilling


def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    return distilling(base)(tiny_vit(), args, train_dataset=TinyImages(4), **options)


def test_the_gradient_is_unbiased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_unbiased(build, tmp_path, monkeypatch)


def test_one_control_example_is_never_broadcast(tmp_path: Path) -> None:
    """The teacher's rows of one example would be broadcast against those of four without a word."""
    args = arguments(tmp_path, per_device_train_batch_size=4, lgp_control_fraction=0.25)
    trainer = build(LGPTrainer, args)
    trainer.train()
    assert trainer._lgp_steps["predicted"] == 6 and all(one == other for one, other in trainer.shapes)
    assert losses(trainer)[-1] < losses(trainer)[0]
