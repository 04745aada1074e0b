"""Heads of one's own: called several times, frozen, or with a forward that needs more than a batch has by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Build, assert_unbiased
from tiny import TinyImages, TinyTexts, tiny_bert, tiny_vit
from torch import Tensor, nn
from transformers import Trainer


class SampledOften(nn.Module):
    """One linear head for several views of the pooled row, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = tiny_bert().bert.double(), nn.Linear(8, 3).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pooled = self.body(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits = torch.stack([self.classifier(pooled * scale) for scale in (0.5, 1.0, 1.5)]).mean(0)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Demanding(nn.Module):
    """A forward with a required argument that is no tensor of the examples, by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_vit()

    def forward(self, pixel_values: Tensor, *, temperature: float, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(pixel_values=pixel_values).logits / temperature
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def several_calls(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    torch.manual_seed(2)
    return base(SampledOften(), args, train_dataset=TinyTexts(4), **options)


def required_arguments(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    class Asking(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return model(**inputs, temperature=2.0)["loss"]

    return Asking(Demanding(), args, train_dataset=TinyImages(4), **options)


def frozen_head(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    model = tiny_vit()
    model.classifier.requires_grad_(False)
    return base(model, args, train_dataset=TinyImages(4), **options)


@pytest.mark.parametrize("build", [several_calls, required_arguments, frozen_head])
def test_the_gradient_is_unbiased(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_unbiased(build, tmp_path, monkeypatch)
