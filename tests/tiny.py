"""Tiny models and data sets for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification


def tiny_vit(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **overrides: Any) -> ViTForImageClassification:
    """A two-block ViT of width 8 on 8x8 images with non-trivial norms, head and biases."""
    torch.manual_seed(1)
    config = ViTConfig(
        **{
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "num_labels": 3,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            **overrides,
        }
    )
    model = ViTForImageClassification(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class TinyImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images with labels of the wanted kind: ``"class"``, ``"ignored"`` (some -100), ``"multi"`` or ``"regression"``."""

    def __init__(self, count: int, kind: str = "class", dtype: torch.dtype = torch.float64, labels: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype)
        if kind == "multi":
            self.labels = (torch.rand(count, labels, generator=generator) < 0.5).to(dtype)
        elif kind == "regression":
            self.labels = torch.randn(count, generator=generator, dtype=dtype)
        else:
            self.labels = torch.randint(0, labels, (count,), generator=generator)
            if kind == "ignored":
                self.labels[::3] = -100

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Examples ``start`` to ``stop`` as one batch."""
        return {"pixel_values": self.pixels[start:stop], "labels": self.labels[start:stop]}
