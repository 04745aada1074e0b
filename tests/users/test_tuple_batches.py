"""Batches that are tuples, from a collator, for a model that takes them by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_unbiased
from tiny import TinyImages, tiny_vit
from torch import Tensor, nn
from transformers import Trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(pixel_values=images).logits


def collate(rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["pixel_values"] for row in rows]), torch.stack([row["labels"] for row in rows])


def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    class Pairs(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            images, labels = inputs
            return F.cross_entropy(model(images), labels)

    return Pairs(Net(), args, train_dataset=TinyImages(4), data_collator=collate, **options)


def test_tuple_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_unbiased(build, tmp_path, monkeypatch, remove_unused_columns=False)
