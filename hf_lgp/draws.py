"""Random draws that never touch the global streams: control sets and private randomness for extra passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def private_seed(*keys: int) -> int:
    """A well mixed 63-bit seed from integers (seed, step, micro-batch, process): stateless, so it survives any resume."""
    return int(np.random.SeedSequence([key % 2**32 for key in keys]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def private_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Run with a private random stream and leave the global ones as they were."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        yield


def draw_control(
    examples: int, controls: int, seed: int, labelled: Tensor | None = None
) -> tuple[Tensor, float | Tensor]:
    """Draw the control examples uniformly without replacement.

    Args:
        examples: Size ``m`` of the micro-batch.
        controls: Number ``m_c`` of control examples.
        seed: Seed of the draw.
        labelled: Which examples contribute to the loss, bool, shape ``(m,)``; None for all. Those without a label have no
            gradient, so control examples are drawn among the others as long as there are any; the draw stays uniform.

    Returns:
        ``order``, int64 of shape ``(m,)`` on the device of ``labelled``: the control examples are its first ``m_c`` entries; and
        the weight ``w`` that makes ``w * sum_S`` unbiased for the sum over all: ``m / m_c``, or the same ratio of labelled
        examples as a tensor.
    """
    keys = torch.rand(examples, generator=torch.Generator().manual_seed(seed))
    if labelled is None:
        return keys.argsort(), examples / controls
    order = (keys.to(labelled.device, non_blocking=True) + (~labelled).to(keys.dtype)).argsort()
    count = labelled.sum()
    return order, count.clamp(min=1) / count.clamp(min=1, max=controls)
