"""Tiny models and data sets for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

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
"""Families of image classifiers: config, model, and what their tiny version needs beyond a ViT's."""


def tiny_classifier(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A two-block image classifier of width 8 on 8x8 images with non-trivial norms, layer scales, head and biases."""
    torch.manual_seed(1)
    config, kind, extra = CLASS_TOKEN_FAMILIES[family]
    sizes = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return perturbed(kind(config(**{**sizes, **extra, **overrides})).to(dtype))


def tiny_swin(**overrides: Any) -> Any:
    """A two-stage Swin on 8x8 images."""
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 2}
    depth = {"depths": [1, 1], "num_heads": [2, 2], "drop_path_rate": 0.0}
    torch.manual_seed(1)
    return SwinForImageClassification(SwinConfig(**{**sizes, **depth, "num_labels": 3, **overrides}))


def tiny_convnext(**overrides: Any) -> Any:
    """A two-stage ConvNeXt on 8x8 images."""
    sizes = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    torch.manual_seed(1)
    return ConvNextForImageClassification(ConvNextConfig(**{**sizes, "num_labels": 3, **overrides}))


def tiny_bert(**overrides: Any) -> Any:
    """A two-layer Bert on up to 12 of 11 tokens."""
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return perturbed(BertForSequenceClassification(BertConfig(**{**sizes, **overrides})))


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


def _labels(count: int, kind: str, dtype: torch.dtype, labels: int, generator: torch.Generator) -> Tensor:
    if kind == "multi":
        return (torch.rand(count, labels, generator=generator) < 0.5).to(dtype)
    if kind == "regression":
        return torch.randn(count, generator=generator, dtype=dtype)
    classes = torch.randint(0, labels, (count,), generator=generator)
    if kind == "ignored":
        classes[::3] = -100
    return classes


class TinyImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images with labels of the wanted kind: ``"class"``, ``"ignored"`` (some -100), ``"multi"`` or ``"regression"``."""

    def __init__(self, count: int, kind: str = "class", dtype: torch.dtype = torch.float64, labels: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype)
        self.labels = _labels(count, kind, dtype, labels, generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Examples ``start`` to ``stop`` as one batch."""
        return {"pixel_values": self.pixels[start:stop], "labels": self.labels[start:stop]}


class TinyTexts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random token sequences of two to eight tokens, padded to eight, with labels as :class:`TinyImages` has."""

    def __init__(self, count: int, kind: str = "class", dtype: torch.dtype = torch.float64, labels: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(2, 9, (count, 1), generator=generator)
        self.mask = (torch.arange(8) < lengths).long()
        self.tokens = torch.randint(2, 11, (count, 8), generator=generator) * self.mask
        self.labels = _labels(count, kind, dtype, labels, generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "attention_mask": self.mask[index], "labels": self.labels[index]}
