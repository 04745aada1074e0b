# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "hf-lgp",
#     "scikit-learn",
# ]
#
# [tool.uv.sources]
# hf-lgp = { path = "..", editable = true }
# ///
"""The one-word swap, side by side: the same model, data and arguments under ``Trainer`` and under ``LGPTrainer``.

Run it by ``python examples/swap.py``.
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_lgp import LGPTrainer


class Digits(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The handwritten digits of scikit-learn; every fifth is held out."""

    def __init__(self, held_out: bool) -> None:
        digits = load_digits()
        chosen = (torch.arange(len(digits.target)) % 5 == 0) == held_out
        self.pixels = torch.from_numpy(digits.images).float()[chosen, None] / 8 - 1
        self.labels = torch.from_numpy(digits.target)[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def main(epochs: float = 10) -> dict[str, dict[str, float]]:
    """Train with both and return their metrics by the trainer's name."""
    config = ViTConfig(
        image_size=8,
        patch_size=1,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
    )
    results = {}
    for kind in (Trainer, LGPTrainer):
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=64,
                learning_rate=1e-3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            model = ViTForImageClassification(config)
            trainer = kind(model, args, train_dataset=Digits(held_out=False), eval_dataset=Digits(held_out=True))
            metrics = trainer.train().metrics
            results[kind.__name__] = {"seconds": metrics["train_runtime"], **trainer.evaluate()}
    for name, result in results.items():
        print(f"{name}: {result['seconds']:.1f} s, held-out loss {result['eval_loss']:.4f}")
    return results


if __name__ == "__main__":
    main()
