"""Exchange: what the exact examples of each process teach, shared by all processes of a distributed run.

Gradients are none of its business; those are averaged by whoever wraps the model. Here a few rows per example and the bases'
power steps travel, after the backward pass and in the same order everywhere, so that every process holds the same window, bases and
coefficients, and a checkpoint of one serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """Collectives among the processes of the default group; a single process keeps what it has.

    Attributes:
        processes: Their number.
    """

    def __init__(self) -> None:
        self.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """Rows of all processes, those of the first process first.

        Args:
            parts: Matrices of ``b`` rows each, shape ``(b, ...)``, equally many rows on every process.

        Returns:
            The same with ``processes * b`` rows, in the dtypes given; one collective serves all.
        """
        if self.processes == 1:
            return list(parts)
        rows, widths = len(parts[0]), [part.flatten(1).shape[1] for part in parts]
        wide = parts[0].dtype
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        mine = torch.cat([part.flatten(1).to(wide) for part in parts], dim=1)
        everyones = mine.new_empty(self.processes * rows, mine.shape[1])
        dist.all_gather(list(everyones.chunk(self.processes)), mine)
        return [
            some.unflatten(1, part.shape[1:]).to(part.dtype)
            for some, part in zip(everyones.split(widths, dim=1), parts, strict=True)
        ]

    def average(self, parts: Sequence[Tensor]) -> None:
        """Replace tensors by their means over processes, in place; one collective serves all.

        Args:
            parts: Tensors of one dtype, of the same shapes on every process.
        """
        if self.processes == 1 or not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        flat /= self.processes
        for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))
