"""Small models of every architecture that classifies images, videos, sounds or texts in transformers, and tasks that they can learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers as t
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.models.auto import modeling_auto as auto

CLASSES = 4
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embedding_size", "hidden_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "d_ff", "d_inner", "n_inner", "ffn_dim", "d_kv"), 256),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("decoder_ffn_dim",), 256),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "entity_emb_size"), 64),
    **dict.fromkeys(("entity_vocab_size", "hash_bucket_count"), 64),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "d_kv": 32,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "image_size": 32,
    "patch_size": 4,
    "num_frames": 4,
    "tubelet_size": 2,
    "use_cache": False,
    "use_mean_pooling": True,
}
_CONVOLUTIONS = dict(
    conv_dim=(32,) * 4, conv_kernel=(10, 5, 4, 4), conv_stride=(8, 4, 4, 2), num_conv_pos_embeddings=16
)
_SPECIAL: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": dict(
        num_mel_bins=32, max_length=64, patch_size=8, frequency_stride=4, time_stride=8
    ),
    # as all published checkpoints have it
    **{name: dict(use_relative_position_bias=True) for name in ("beit", "data2vec-vision")},
    "vivit": dict(tubelet_size=[2, 4, 4]),
    **{
        name: _CONVOLUTIONS
        for name in (
            "hubert",
            "sew",
            "sew-d",
            "unispeech",
            "unispeech-sat",
            "wav2vec2",
            "wavlm",
            "data2vec-audio",
            "wav2vec2-conformer",
        )
    },
    "wav2vec2-bert": dict(feature_projection_input_dim=32),
    "whisper": dict(num_mel_bins=32, max_source_positions=64),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "gpt_neox": dict(rotary_pct=0.25),
    "swin": dict(window_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], patch_size=2),
    "swinv2": dict(window_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], patch_size=2),
    "layoutlmv3": dict(visual_embed=False),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local"] * 4),
    "xmod": dict(default_language="en_XX", languages=["en_XX"]),
    "esmc": dict(num_key_value_heads=4),
    "t5": dict(decoder_start_token_id=0),
}


def architectures() -> Iterator[tuple[str, str, type]]:
    """Every model type with a classification class: what it reads, its name, its configuration class."""
    for reads in ("image", "video", "audio", "sequence"):
        for name in getattr(auto, f"MODEL_FOR_{reads.upper()}_CLASSIFICATION_MAPPING_NAMES"):
            if name in t.CONFIG_MAPPING:
                yield reads, name, t.CONFIG_MAPPING[name]
    for name, (reads, _) in EXTRA.items():
        yield reads, name, t.PreTrainedConfig


def small_config(kind: type, name: str = "", own_heads: bool = False) -> Any:
    """A configuration with four narrow layers and no dropout, of whatever class; with the widths of heads it has anyway, if it is told so."""
    default = kind()
    known = {
        n: v
        for n, v in _SIZES.items()
        if type(getattr(default, n, None)) in (type(v), type(None)) and hasattr(default, n)
    }
    for n in ("head_dim", "num_key_value_heads") if own_heads else ():
        known.pop(n, None)
    for n, v in default.to_dict().items():
        if isinstance(v, float) and any(sign in n for sign in ("drop", "mask_time_prob", "mask_feature_prob")):
            known[n] = 0.0
    for n, sub in getattr(kind, "sub_configs", {}).items():
        if isinstance(sub, type) and getattr(default, n, None) is not None:
            known[n] = small_config(type(getattr(default, n))).to_dict()
    return kind(**{**known, **_SPECIAL.get(name, {}), "num_labels": CLASSES})


def build(reads: str, kind: type, name: str, own_heads: bool = False, seed: int = 0) -> nn.Module:
    """A small model of a type, with random weights."""
    torch.manual_seed(seed)
    if name in EXTRA:
        return EXTRA[name][1]()
    classes = getattr(auto, f"MODEL_FOR_{reads.upper()}_CLASSIFICATION_MAPPING_NAMES")[name]
    model_class = getattr(t, classes[0] if isinstance(classes, (list, tuple)) else classes)
    model: nn.Module = model_class(small_config(kind, name, own_heads))
    return model


class Head(nn.Module):
    """A classifier on the rows of an encoder: on the first, or on their mean."""

    def __init__(self, encoder: nn.Module, config: Any, mean: bool) -> None:
        super().__init__()
        self.encoder, self.config, self.mean = encoder, config, mean
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, labels: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Any:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        rows = self.encoder(**inputs, **masked).last_hidden_state
        mask = torch.ones_like(rows[..., :1]) if attention_mask is None else attention_mask[..., None].to(rows.dtype)
        logits = self.classifier((rows * mask).sum(1) / mask.sum(1) if self.mean else rows[:, 0])
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class TorchEncoder(nn.Module):
    """PyTorch's own encoder of texts."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.words, self.positions = nn.Embedding(256, 128), nn.Parameter(0.1 * torch.randn(64, 128))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        rows = self.words(input_ids) + self.positions
        return BaseModelOutput(last_hidden_state=self.layers(rows, src_key_padding_mask=attention_mask == 0))


def _adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(build("image", t.ViTConfig, "vit"), settings)


def _timm(architecture: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
        config = t.TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=sizes)
        return t.TimmWrapperForImageClassification(config)

    return made


def _of_type(kind: type, model_class: Any, mean: bool, **more: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        config = small_config(kind)
        for name, value in more.items():
            setattr(config, name, value)
        return Head(model_class(config), config, mean)

    return made


def _torch_encoder(norm_first: bool) -> Callable[[], nn.Module]:
    return lambda: Head(TorchEncoder(norm_first), t.BertConfig(), mean=True)


def _beit_class_token() -> nn.Module:
    config = small_config(t.BeitConfig, "beit")
    config.use_mean_pooling = False
    return t.BeitForImageClassification(config)


EXTRA: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "beit, class token": ("image", _beit_class_token),
    "dinov3_vit, head on the class token": ("image", _of_type(t.DINOv3ViTConfig, t.DINOv3ViTModel, False)),
    "vit with LoRA": ("image", _adapted),
    "timm: vit_tiny_patch16_224": ("image", _timm("vit_tiny_patch16_224")),
    "timm: eva02_tiny_patch14_224": ("image", _timm("eva02_tiny_patch14_224")),
    "timm: deit3_small_patch16_224": ("image", _timm("deit3_small_patch16_224")),
    "bert, head on the mean": ("sequence", _of_type(t.BertConfig, t.BertModel, True)),
    "nn.TransformerEncoder, norms first": ("sequence", _torch_encoder(True)),
    "nn.TransformerEncoder, norms last": ("sequence", _torch_encoder(False)),
}
"""Models that no type of transformers' classes stands for."""


def examples_of(reads: str, config: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Examples of a task with as many classes as :data:`CLASSES`, as a model of this configuration takes them."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    return {**_MADE[reads](config, labels, draw), "labels": labels}


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits below :data:`CLASSES`, 8 pixels wide, and which they are."""
    digits = load_digits()
    known = digits.target < CLASSES
    return torch.from_numpy(digits.images[known]).float()[:, None] / 8.0 - 1.0, torch.from_numpy(digits.target[known])


def _images(config: Any, labels: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """A handwritten digit of its class in some colour, three quarters as wide as the image, somewhere in it."""
    side, channels = _of(config, "image_size", 32), _of(config, "num_channels", 3)
    side = side if isinstance(side, int) else side[0]
    images, kinds = _digits()
    chosen = torch.stack(
        [own[torch.randint(0, len(own), (1,), generator=draw)[0]] for own in (images[kinds == k] for k in labels)]
    )
    drawn = F.interpolate(chosen, (side * 3 // 4,) * 2, mode="bilinear")
    drawn = drawn * (0.5 + torch.rand(len(labels), channels, 1, 1, generator=draw))
    pixels = 0.1 * torch.randn(len(labels), channels, side, side, generator=draw) - 1.0
    for image, digit in zip(pixels, drawn, strict=True):
        top, left = torch.randint(0, side // 4 + 1, (2,), generator=draw).tolist()
        image[:, top : top + digit.shape[1], left : left + digit.shape[2]] += digit + 1.0
    if config.model_type == "siglip2":  # which is given patches
        patches = torch.nn.functional.unfold(pixels, 4, stride=4).mT
        shapes = torch.tensor([[side // 4, side // 4]]).expand(len(labels), 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": pixels}


def _videos(config: Any, labels: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    still, frames = _images(config, labels, draw)["pixel_values"], _of(config, "num_frames", 4)
    moved = [still.roll(3 * k, -1) for k in range(frames)]
    name = "pixel_values_videos" if config.model_type in ("vjepa2", "videoprism_vision_model") else "pixel_values"
    return {name: torch.stack(moved, 1)}


def _sounds(config: Any, labels: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Two tones of its class, of any phase and loudness, in noise: a wave, or how much there is of each of 32 pitches."""
    kind, count = config.model_type, len(labels)
    loud = 0.5 + torch.rand(count, 2, 1, generator=draw)
    if kind in ("audio-spectrogram-transformer", "wav2vec2-bert", "whisper"):
        frames, pitches = (128 if kind == "whisper" else 64), torch.arange(32.0)
        centre = torch.stack([4.0 + 6 * labels, 30.0 - 5 * labels], 1)[..., None]
        strength = (loud * (-0.5 * (pitches - centre).square()).exp()).sum(1)
        noise = 0.5 * torch.randn(count, frames, 32, generator=draw)
        beat = (torch.rand(count, frames, 1, generator=draw) < 0.3).float()
        values = noise + 2.0 * beat * strength[:, None]
        if kind == "audio-spectrogram-transformer":
            return {"input_values": values}
        return {"input_features": values.mT.contiguous() if kind == "whisper" else values}
    time, phase = torch.arange(12_800) / 16_000, 6.3 * torch.rand(count, 2, 1, generator=draw)
    pitch = torch.stack([200.0 + 150 * labels, 2000.0 - 300 * labels], 1)[..., None]
    wave = (loud * (6.283 * pitch * time + phase).sin()).sum(1)
    return {"input_values": wave + 0.5 * torch.randn(count, len(time), generator=draw)}


def _texts(config: Any, labels: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Words as frequent as in a language, a quarter of them from a list of its class; 24 to 64 words, padded behind."""
    count, most = len(labels), 64
    frequent = 1.0 / torch.arange(1.0, 201.0)
    words = torch.multinomial(frequent, count * most, replacement=True, generator=draw).view(count, most)
    topical = 40 + 40 * labels[:, None] + torch.randint(0, 40, (count, most), generator=draw)
    words = 4 + torch.where(torch.rand(count, most, generator=draw) < 0.25, topical, words)
    lengths = torch.randint(24, most + 1, (count, 1), generator=draw)
    at = torch.arange(most)
    words[:, 0] = 1
    words = torch.where(at == lengths - 1, 2, words)
    mask = at < lengths
    return {"input_ids": torch.where(mask, words, 0), "attention_mask": mask.long()}


def _of(config: Any, name: str, default: Any) -> Any:
    for each in (config, getattr(config, "vision_config", None)):
        if getattr(each, name, None) is not None:
            return getattr(each, name)
    return default


_MADE: dict[str, Callable[[Any, Tensor, torch.Generator], dict[str, Tensor]]] = {
    "image": _images,
    "video": _videos,
    "audio": _sounds,
    "sequence": _texts,
}
