"""The tasks of ``time_to_accuracy.py``: CIFAR-10 from random weights, and five of its classes by a ViT that knows the others."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import VITS, BatchAugmented, Positions, build_vit, load_cifar
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTForImageClassification


def training_arguments(options: argparse.Namespace, seed: int, **others: Any) -> dict[str, Any]:
    """What all arms share."""
    return {
        "per_device_train_batch_size": options.batch,
        "dataloader_drop_last": True,  # batches of one size, so that nothing is compiled twice
        "remove_unused_columns": False,
        "optim": "adamw_torch_fused",
        "weight_decay": options.weight_decay,
        "seed": seed,
        "bf16": options.bf16,
        "use_cpu": options.cpu,
        "torch_compile": options.compile,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **others,
    }


@dataclass
class Task:
    """What all arms train and are tested on.

    Attributes:
        train: Images and labels.
        test: Images and labels.
        model: Builds the model of a seed.
        augment: Whether crops and flips leave the labels right.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[int], ViTForImageClassification]
    augment: bool = True


def scratch_folder(options: argparse.Namespace) -> Path:
    """Where caches lie, hidden from git."""
    folder: Path = options.output / ".scratch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def resized(images: Tensor, side: int) -> Tensor:
    """Images of another side, bilinear, still uint8."""
    if images.shape[-1] == side:
        return images
    parts = (torch.nn.functional.interpolate(p.float(), size=(side, side), mode="bilinear") for p in images.split(1000))
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def cifar(options: argparse.Namespace, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 at the model's image size, decoded once."""
    count = 1500 if options.smoke else None
    side = VITS[options.vit]["image_size"]
    cached = scratch_folder(options) / f"{split}-{side}-{count or 'all'}.pt"
    if not cached.is_file():
        if options.data is None:
            raise SystemExit("--data must name a folder with CIFAR-10 as train.parquet and test.parquet.")
        images, labels = load_cifar(options.data, split, count)
        torch.save((resized(images, side), labels), cached)
    return torch.load(cached)


def scratch(options: argparse.Namespace) -> Task:
    """CIFAR-10 from random weights."""
    images, labels = cifar(options, "train")
    count, test = options.images or len(images), cifar(options, "test")
    return Task(
        (images[:count].clone(), labels[:count].clone()),
        (test[0][: options.test_images or None], test[1][: options.test_images or None]),
        lambda seed: build_vit(options.vit, seed=seed, attn_implementation=options.attention),
    )


def finetune(options: argparse.Namespace) -> Task:
    """The last five classes of CIFAR-10, by a ViT that knows the first five."""
    train, test = cifar(options, "train"), cifar(options, "test")
    known = train[1] < 5
    stem = f"pretrained-{options.vit}-{int(known.sum())}-{options.pretrain_epochs}"
    cached = scratch_folder(options) / f"{stem}.pt"
    if not cached.is_file():
        model = build_vit(options.vit, labels=5, seed=1000, attn_implementation=options.attention)
        arguments = training_arguments(options, 1000, learning_rate=1e-3, num_train_epochs=options.pretrain_epochs)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                TrainingArguments(folder, **arguments),
                train_dataset=Positions(int(known.sum())),
                data_collator=BatchAugmented(train[0][known], train[1][known]),
            )
            trainer.train()
        state = {name: value.cpu() for name, value in model.state_dict().items() if not name.startswith("classifier")}
        torch.save(state, cached)
    weights = torch.load(cached)

    def model_of(seed: int) -> ViTForImageClassification:
        model = build_vit(options.vit, labels=5, seed=seed, attn_implementation=options.attention)
        model.load_state_dict(weights, strict=False)  # all but the new head
        return model

    def others(images: Tensor, labels: Tensor, count: int = 0) -> tuple[Tensor, Tensor]:
        chosen = (labels >= 5).nonzero().flatten()
        chosen = chosen[: count or len(chosen)]
        return images[chosen], labels[chosen] - 5

    return Task(others(*train, options.images), others(*test), model_of)
