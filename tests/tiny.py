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
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
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


def tiny_swin(**overrides: Any) -> Any:
    """A two-stage Swin on 8x8 images."""
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 2}
    depth = {"depths": [1, 1], "num_heads": [2, 2], "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(**{**sizes, **depth, "num_labels": 3, **overrides}))


def tiny_convnext(**overrides: Any) -> Any:
    """A two-stage ConvNeXt on 8x8 images."""
    sizes = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    return ConvNextForImageClassification(ConvNextConfig(**{**sizes, "num_labels": 3, **overrides}))


_TEXT_SIZES = {
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


def tiny_bert(**overrides: Any) -> Any:
    """A two-layer Bert on up to 12 of 11 tokens."""
    return BertForSequenceClassification(BertConfig(**{**_TEXT_SIZES, **overrides}))


def tiny_roberta(**overrides: Any) -> Any:
    """A two-layer Roberta on up to 10 of 11 tokens."""
    return RobertaForSequenceClassification(RobertaConfig(**{**_TEXT_SIZES, **overrides}))


OTHER_FAMILIES = {"swin": tiny_swin, "convnext": tiny_convnext, "bert": tiny_bert, "roberta": tiny_roberta}
"""Families without a class-token path."""

TEXT_FAMILIES = ("bert", "roberta")
"""Those that read tokens."""


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A tiny classifier of any family, with noise on every parameter."""
    if family in CLASS_TOKEN_FAMILIES:
        return tiny_classifier(family, dtype, **overrides)
    torch.manual_seed(1)
    return perturbed(OTHER_FAMILIES[family](**overrides).to(dtype))


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
        # Token 1 is Roberta's padding; Bert's is 0.
        self.tokens = torch.where(self.mask.bool(), torch.randint(2, 11, (count, 8), generator=generator), 1)
        self.labels = _labels(count, kind, dtype, labels, generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


def hooks_of(model: nn.Module) -> int:
    """Number of this package's hooks on the model's modules."""
    hooks = [
        getattr(hook, "func", hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(hook.__module__.startswith("hf_lgp") for hook in hooks)
