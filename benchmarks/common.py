"""What every benchmark needs: hardware and versions, timing, ViT shapes, CIFAR-10, and result files."""

from __future__ import annotations

import io
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

RESULTS = Path(__file__).parent / "results"

VITS: dict[str, dict[str, int]] = {
    "cifar-0.8m": dict(
        image_size=32, patch_size=4, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512
    ),
    "cifar-145": dict(
        image_size=48, patch_size=4, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512
    ),
    "cifar-101": dict(
        image_size=40, patch_size=4, hidden_size=160, num_hidden_layers=5, num_attention_heads=5, intermediate_size=640
    ),
    "width-384": dict(
        image_size=32, patch_size=4, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    ),
    "digits-tiny": dict(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ),
    "vit-small-16": dict(
        image_size=224,
        patch_size=16,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
    ),
    "vit-base-16": dict(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    ),
}

BATCHES = {"cifar-101": 96}
"""Batch sizes that steps are timed at, where it is not 64."""


def build_vit(
    name: str, labels: int = 10, seed: int = 0, attn_implementation: str | None = None
) -> ViTForImageClassification:
    """A ViT of :data:`VITS` with random weights and no dropout, and transformers' choice of attention unless one is named."""
    torch.manual_seed(seed)
    config = ViTConfig(
        **VITS[name],  # type: ignore[arg-type]
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attn_implementation,
    )
    return ViTForImageClassification(config)


def load_cifar(folder: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Decoded CIFAR-10: images uint8 ``(n, 3, 32, 32)`` and labels ``(n,)`` from ``<folder>/<split>.parquet``."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: --data must name a folder with CIFAR-10 as train.parquet and test.parquet."
        )
    rows = load_dataset("parquet", data_files={"rows": str(path)}, split="rows").cast_column(
        "img", ImageFeature(decode=False)
    )
    rows = rows.select(range(len(rows) if count is None else min(count, len(rows))))
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["img"]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"][:])


def random_images(vit: str, count: int, labels: int = 10) -> tuple[Tensor, Tensor]:
    """Noise of the size that a ViT of :data:`VITS` takes, shape ``(count, 3, side, side)``, and labels at random."""
    draw, side = torch.Generator().manual_seed(0), VITS[vit]["image_size"]
    return torch.randn(count, 3, side, side, generator=draw), torch.randint(0, labels, (count,), generator=draw)


class Positions(torch.utils.data.Dataset[int]):
    """The numbers below ``count``: a data set whose examples :class:`BatchAugmented` fetches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class BatchAugmented:
    """A collator: random crops (padding of an eighth of their side) and horizontal flips, normalised to [-1, 1], for a whole batch at once."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool = True) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __call__(self, positions: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(positions)
        images = self.images[chosen]
        if self.augment:
            count, side = len(images), images.shape[-1]
            padding = side // 8
            top, left = torch.randint(0, 2 * padding + 1, (2, count))
            flipped = torch.rand(count) < 0.5
            padded = torch.nn.functional.pad(images, (padding,) * 4)
            images = padded.unfold(2, side, 1).unfold(3, side, 1)[torch.arange(count), :, top, left]
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return {"pixel_values": images.float().div_(127.5).sub_(1.0), "labels": self.labels[chosen]}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, to stand beside every number."""
    hardware = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            hardware = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def thinned(entries: list[Any], most: int = 32) -> list[Any]:
    """At most so many of a list's entries, evenly spaced, the last among them."""
    count = min(len(entries), most)
    return [entries[len(entries) * (i + 1) // count - 1] for i in range(count)]


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, creating its folder: six digits of every number, and what holds nothing nested on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(result) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


def _json(value: Any, indent: str = "") -> str:
    if isinstance(value, float):
        return json.dumps(float(f"{value:.6g}"))
    if not isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts, items = [f"{json.dumps(str(k))}: {_json(v, inner)}" for k, v in value.items()], list(value.values())
    else:
        parts, items = [_json(item, inner) for item in value], list(value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if any(isinstance(item, (dict, list, tuple)) for item in items):
        return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"
    return opening + ", ".join(parts) + closing
