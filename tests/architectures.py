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


class Head(nn.Module):
    """A classifier on what an encoder of images makes its summary."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(8, 3)
        self.config = t.PreTrainedConfig()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.classifier(self.encoder(pixel_values).pooler_output)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def _modernbert() -> Any:
    still = {"embedding_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    return t.ModernBertConfig(vocab_size=20, **_SIZES, **still, num_labels=3, local_attention=4, pad_token_id=0)


def _lora() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    )
    return get_peft_model(t.ViTForImageClassification(t.ViTConfig(**_IMAGE)), config)


class FusedAttention(nn.Module):
    """As timm has it: queries, keys and values by one layer, and PyTorch's attention called by the module itself."""

    def __init__(self, norms: bool, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8) if gated else None
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm = (nn.LayerNorm(4), nn.LayerNorm(4)) if norms else (nn.Identity(), nn.Identity())
        self.norm = nn.LayerNorm(8) if norms else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        out = out.transpose(1, 2).reshape(x.shape)
        return self.proj(self.norm(out if self.gate is None else out * self.gate(x).sigmoid()))


class FusedBlock(nn.Module):
    def __init__(self, norms: bool, gated: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), FusedAttention(norms, gated), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fused(nn.Module):
    """A ViT as timm builds it: its blocks in an ``nn.Sequential``."""

    def __init__(self, norms: bool, gated: bool = False) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(FusedBlock(norms, gated) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.config = t.PreTrainedConfig()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        rows = self.patches(pixel_values).flatten(2).mT
        rows = self.norm(self.blocks(torch.cat([self.token.expand(len(rows), -1, -1), rows], 1)))
        logits = self.head(rows[:, 0])
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class OwnEncoder(nn.Module):
    """PyTorch's own encoder, with padding."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first)
        self.words, self.encoder = nn.Embedding(20, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classifier, self.config = nn.Linear(8, 3), t.PreTrainedConfig()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        rows = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.classifier((rows * attention_mask[..., None]).mean(1))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def _decoder(kind: str, **more: Any) -> Any:
    config = t.AutoConfig.for_model(kind, vocab_size=20, num_labels=3, pad_token_id=0, use_cache=False, **more)
    return t.AutoModelForSequenceClassification.from_config(config)


_GROUPED = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
_GPT2 = {"n_embd": 8, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


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
    "dinov3": Architecture(lambda: Head(t.DINOv3ViTModel(t.DINOv3ViTConfig(**_IMAGE, num_register_tokens=1)))),
    "modernbert": Architecture(lambda: t.ModernBertForSequenceClassification(_modernbert()), "tokens"),
    "gpt2": Architecture(lambda: _decoder("gpt2", **_GPT2), "tokens"),
    "llama": Architecture(lambda: _decoder("llama", **_GROUPED), "tokens"),
    "qwen3": Architecture(lambda: _decoder("qwen3", **_GROUPED), "tokens"),
    "fused": Architecture(lambda: Fused(False)),
    "fused with norms": Architecture(lambda: Fused(True)),
    "gated": Architecture(lambda: Fused(True, gated=True)),
    "own encoder": Architecture(lambda: OwnEncoder(True), "tokens"),
    "own encoder, norms last": Architecture(lambda: OwnEncoder(False), "tokens"),
}

READS_FIRST_ROW = {
    "vit",
    "deit",
    "beit class token",
    "vit msn",
    "bert",
    "vit with lora",
    "dinov3",
    "modernbert",
    "fused",
    "fused with norms",
    "gated",
}
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
