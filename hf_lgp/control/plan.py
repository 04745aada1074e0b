"""The plan of a step: one frozen value, decided before it and read by everyone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GROUPS = 8
"""Groups of control examples that a measuring step compares: two are useless, four scatter twice as much."""


@dataclass(frozen=True)
class StepPlan:
    """What is done in one micro-batch."""

    fraction: float = 1.0  # control fraction ``f``; 1 for exact gradients
    measure: int = 0  # groups of control examples whose exact and predicted gradients are compared; 0 for none
    first_row: bool = False  # whether the last block is run on the first row only, in stacks of which only that is read
    seed: int = 0  # of the draws of control examples; each call of a stack draws anew
    rows: int = 0  # how often the number of rows that are followed is doubled
    all_control: bool = False  # for checks: whether every example is a control example, and yet the splice in place

    @property
    def splits(self) -> bool:
        """Whether examples go different ways."""
        return self.fraction < 1.0 or self.measure > 0 or self.all_control

    @property
    def plain(self) -> bool:
        """Whether there is nothing to do but what ``Trainer`` does."""
        return not self.splits and not self.first_row


def private_seed(*keys: int) -> int:
    """A well mixed 63-bit seed from integers (seed, step, micro-batch, process): stateless, so it survives any resume."""
    return int(np.random.SeedSequence([key % 2**32 for key in keys]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_order(examples: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random order of the examples, whose first ``m_c`` are the control examples, and its inverse.

    The global random streams stay untouched.

    Returns:
        Two int64 tensors of shape ``(m,)``.
    """
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    both = torch.stack([order, order.argsort()])
    cuda = device.type == "cuda"
    both = (both.pin_memory() if cuda else both).to(device, non_blocking=cuda)
    return both[0], both[1]


@lru_cache(maxsize=8)
def identity_order(examples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The examples in the order in which they came."""
    order = torch.arange(examples, device=device)
    return order, order
