"""Tiny models with a trunk, and steps that fill a predictor's window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_lgp.control.plan import StepPlan
from hf_lgp.linear.predictor import LinearPredictor
from hf_lgp.linear.trunk import spliced_trunk
from hf_lgp.settings import LGPSettings

_BLOCKS = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in _BLOCKS.items() if name not in names}


def _config(family: str) -> Any:
    if family == "vit":
        return ViTConfig(**_without("drop_path_rate"))
    if family == "beit":
        return BeitConfig(**_BLOCKS, use_mean_pooling=True, layer_scale_init_value=0.5)
    if family == "convnext":
        return ConvNextConfig(
            num_channels=1, patch_size=2, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3
        )
    if family == "bert":
        return BertConfig(
            **_without("image_size", "patch_size", "num_channels", "drop_path_rate"),
            vocab_size=11,
            max_position_embeddings=12,
        )
    return SwinConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        embed_dim=8,
        window_size=2,
        depths=[1, 1],
        num_heads=[2, 2],
        drop_path_rate=0.0,
        num_labels=3,
    )


_KINDS = {
    "vit": ViTForImageClassification,
    "beit": BeitForImageClassification,
    "convnext": ConvNextForImageClassification,
    "swin": SwinForImageClassification,
    "bert": BertForSequenceClassification,
}
IMAGES = ("vit", "beit", "convnext", "swin")


def tiny(family: str) -> Any:
    """A tiny classifier in float64, with noise on every parameter."""
    torch.manual_seed(1)
    model = _KINDS[family](_config(family)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(examples: int, seed: int) -> dict[str, Tensor]:
    """Images in which the label is a bright stripe."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (examples,), generator=generator)
    images = torch.randn(examples, 1, 8, 8, generator=generator, dtype=torch.float64)
    images[torch.arange(examples), 0, 2 * labels] += 2.0
    return {"pixel_values": images, "labels": labels}


def gradient(model: Any, inputs: dict[str, Tensor]) -> list[Tensor | None]:
    """The gradient of every parameter."""
    return list(torch.autograd.grad(model(**inputs).loss, list(model.parameters()), allow_unused=True))


def taught(model: Any, trunk: Any, steps: int = 14, **settings: Any) -> LinearPredictor:
    """A predictor that saw a few exact steps of 12 examples."""
    settings = {"window": 96, "rank": 4, "kernel": "linear", **settings}
    predictor = LinearPredictor(trunk, LGPSettings(**settings), torch.float64)
    for step in range(steps):
        with spliced_trunk(trunk, StepPlan(), predictor):
            gradient(model, batch(12, 100 + step))
    return predictor
