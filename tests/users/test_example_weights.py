"""A column that only ``compute_loss`` knows, popped there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_unbiased
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import Trainer


class Weighted(TinyImages):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "weight": torch.tensor(1.0 + index)}


def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    class Weighing(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            weights, labels = inputs.pop("weight"), inputs.pop("labels")
            assert list(inputs) == ["pixel_values"], "a batch comes with all its columns, once"
            return (weights * F.cross_entropy(model(**inputs).logits, labels, reduction="none")).mean()

    return Weighing(tiny_vit(), args, train_dataset=Weighted(4), **options)


def test_weights_popped_in_compute_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_unbiased(build, tmp_path, monkeypatch, remove_unused_columns=False)
