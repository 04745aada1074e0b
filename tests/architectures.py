"""Tiny encoders of many architectures with random inputs, in float64 and without dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

EXAMPLES = 4
LABELS = torch.tensor([0, 1, 2, 0])

_SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGE = {**_SIZES, **_STILL, "image_size": 8, "patch_size": 4, "num_labels": 3}
_TOWERS = {
    "vision_config": {**_SIZES, "image_size": 8, "patch_size": 4, "attention_dropout": 0.0},
    "text_config": {**_SIZES, "vocab_size": 20},
    "num_labels": 3,
}
_BEIT = {**_IMAGE, "use_relative_position_bias": True, "drop_path_rate": 0.0, "layer_scale_init_value": 0.5}
_DINO = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 8,
    "patch_size": 4,
}


class MeanBert(nn.Module):
    """A Bert whose head reads the mean over tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = t.BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        rows = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(rows.dtype)
        logits = self.classifier((rows * mask).sum(1) / mask.sum(1))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def _bert() -> Any:
    return t.BertConfig(vocab_size=20, **_SIZES, **_STILL, num_labels=3)


def _lora() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    )
    return get_peft_model(t.ViTForImageClassification(t.ViTConfig(**_IMAGE)), config)


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and what it reads: ``pixels``, ``frames`` or ``tokens``."""

    build: Callable[[], Any]
    reads: str = "pixels"


ARCHITECTURES = {
    "vit": Architecture(lambda: t.ViTForImageClassification(t.ViTConfig(**_IMAGE))),
    "deit": Architecture(lambda: t.DeiTForImageClassification(t.DeiTConfig(**_IMAGE))),
    "beit class token": Architecture(
        lambda: t.BeitForImageClassification(t.BeitConfig(**_BEIT, use_mean_pooling=False))
    ),
    "beit mean": Architecture(lambda: t.BeitForImageClassification(t.BeitConfig(**_BEIT))),
    "dinov2 registers": Architecture(
        lambda: t.Dinov2WithRegistersForImageClassification(t.Dinov2WithRegistersConfig(**_DINO, num_labels=3))
    ),
    "vit msn": Architecture(lambda: t.ViTMSNForImageClassification(t.ViTMSNConfig(**_IMAGE))),
    "clip": Architecture(lambda: t.CLIPForImageClassification(t.CLIPConfig(**_TOWERS))),
    "siglip": Architecture(lambda: t.SiglipForImageClassification(t.SiglipConfig(**_TOWERS))),
    "videomae": Architecture(
        lambda: t.VideoMAEForVideoClassification(t.VideoMAEConfig(**_IMAGE, num_frames=4, tubelet_size=2)), "frames"
    ),
    "bert": Architecture(lambda: t.BertForSequenceClassification(_bert()), "tokens"),
    "bert mean": Architecture(lambda: MeanBert(_bert()), "tokens"),
    "vit with lora": Architecture(_lora),
}

READS_FIRST_ROW = {"vit", "deit", "beit class token", "vit msn", "bert", "vit with lora"}
"""Those whose head reads the first row alone."""


def model_of(name: str) -> Any:
    """A tiny model with noise on every parameter, so that none is zero or one."""
    torch.manual_seed(1)
    model = ARCHITECTURES[name].build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, examples: int = EXAMPLES) -> dict[str, Tensor]:
    """Random inputs and labels; texts are of different lengths."""
    draw = torch.Generator().manual_seed(2)
    labels = LABELS[torch.arange(examples) % len(LABELS)]
    if ARCHITECTURES[name].reads == "tokens":
        mask = (torch.arange(7) < torch.tensor([7, 4, 6, 3])[torch.arange(examples) % 4, None]).long()
        tokens = torch.randint(3, 20, (examples, 7), generator=draw)
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}
    shape = (examples, 4, 3, 8, 8) if ARCHITECTURES[name].reads == "frames" else (examples, 3, 8, 8)
    return {"pixel_values": torch.randn(shape, generator=draw, dtype=torch.float64), "labels": labels}


def logits_of(outputs: Any) -> Tensor:
    """The logits of whatever a model returns."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits
