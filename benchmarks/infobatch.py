"""A baseline: unbiased dynamic data pruning by loss, as in InfoBatch (Qin et al., ICLR 2024, arXiv 2303.04947).

Examples whose last loss is below the mean are left out of an epoch with probability ``r``; those of them that stay count ``1 / (1 - r)`` times. The last part of a
run sees all examples. A run is a stream of such epochs, so that it has a given number of steps whatever was left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

PRUNED, WHOLE_FROM = 0.5, 0.875
"""The paper's ``r``, and its ``delta``: the share of a run after which nothing is left out."""


def epoch_of(losses: Tensor, draw: torch.Generator, pruned: float) -> list[tuple[int, float]]:
    """Examples of one epoch in random order, with their weights. A loss that was not seen yet is infinite, and its example stays."""
    seen = losses[losses.isfinite()]
    below = losses < (seen.mean() if len(seen) else 0.0)
    weights = torch.where(below, 1.0 / (1.0 - pruned), 1.0)
    kept = ~below | (torch.rand(len(losses), generator=draw) >= pruned)
    order = torch.randperm(len(losses), generator=draw)
    return [(int(i), float(weights[i])) for i in order if kept[i]]


class PrunedStream(torch.utils.data.Sampler[tuple[int, float]]):
    """Examples and weights for a whole run of ``length`` draws; ``losses (n,)`` are filled in while it goes on."""

    def __init__(self, count: int, length: int, seed: int) -> None:
        self.losses, self.length = torch.full((count,), torch.inf), length
        self.draw = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, float]]:
        drawn, whole_from = 0, math.ceil(WHOLE_FROM * self.length)
        while drawn < self.length:
            prunes = drawn < whole_from
            left = (whole_from if prunes else self.length) - drawn  # a pruned epoch ends where the last part begins
            for pair in epoch_of(self.losses, self.draw, PRUNED if prunes else 0.0)[:left]:
                drawn += 1
                yield pair


class InfoBatchTrainer(Trainer):
    """``Trainer`` on a pruned stream. Needs ``max_steps``, and a data set that hands on what it is asked for, like ``Positions``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        batch = self.args.per_device_train_batch_size
        self.stream = PrunedStream(len(self.train_dataset), self.args.max_steps * batch, self.args.seed)
        self.collate = self.data_collator
        self.data_collator = self._collated

    def _collated(self, pairs: list[tuple[int, float]]) -> dict[str, Tensor]:
        positions, weights = zip(*pairs, strict=True)
        own = {"positions": torch.tensor(positions), "weights": torch.tensor(weights)}
        return {**self.collate(list(positions)), **own}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> PrunedStream:
        return self.stream

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = model(pixel_values=inputs["pixel_values"]).logits
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        self.stream.losses[inputs["positions"].cpu()] = losses.detach().float().cpu()
        return (inputs["weights"] * losses).mean()
