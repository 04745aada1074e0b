"""Numbers that all processes of a distributed run must agree on; a single process keeps what it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes in the default group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over processes of a vector, shape ``(n,)``, equally long everywhere; one collective."""
    if processes() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / processes()


def same_everywhere(values: Sequence[float], device: torch.device) -> bool:
    """Whether all processes have the same numbers; waits for the others."""
    own = torch.tensor(values, dtype=torch.float32, device=device)
    return holds_everywhere(torch.equal(own, mean_over_processes(own)), device)


def holds_everywhere(condition: bool, device: torch.device) -> bool:
    """Whether a condition holds in every process; waits for the others."""
    if processes() == 1:
        return condition
    return bool(mean_over_processes(torch.tensor([float(condition)], device=device)).item() == 1.0)
