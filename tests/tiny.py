"""Tiny models and data sets for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH = 8
"""Width of the tiny backbones."""

CLASS_TOKEN_FAMILIES: dict[str, tuple[type[Any], type[PreTrainedModel], dict[str, Any]]] = {
    "vit": (ViTConfig, ViTForImageClassification, {}),
    "deit": (DeiTConfig, DeiTForImageClassification, {}),
    "beit": (
        BeitConfig,
        BeitForImageClassification,
        {
            "use_mean_pooling": False,
            "use_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.5,
            "drop_path_rate": 0.0,
        },
    ),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"layerscale_value": 0.5, "mlp_ratio": 2}),
}
"""Families with a class-token path: config, model, and what their tiny version needs beyond a ViT's."""


def tiny_classifier(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A two-block image classifier of width 8 on 8x8 images with non-trivial norms, layer scales, head and biases."""
    torch.manual_seed(1)
    config, kind, extra = CLASS_TOKEN_FAMILIES[family]
    sizes = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return perturbed(kind(config(**{**sizes, **extra, **overrides})).to(dtype))


def perturbed(model: nn.Module) -> Any:
    """The model with noise on every parameter, so that none is zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tiny_vit(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **overrides: Any) -> ViTForImageClassification:
    """A two-block ViT of width 8 on 8x8 images with non-trivial norms, head and biases."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return tiny_classifier("vit", dtype, **{**rates, **overrides})


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
