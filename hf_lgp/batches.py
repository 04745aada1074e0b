"""Parts of a batch: which entries of a Trainer's inputs belong to examples, and how to take some of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor


def batch_size(inputs: Mapping[str, Any]) -> int | None:
    """Number of examples: the first dimension of the inputs' first tensor; None if the inputs are not a flat dict of tensors."""
    if any(isinstance(value, (Mapping, list, tuple)) for value in inputs.values()):
        return None
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    return sizes[0] if sizes else None


def entries(inputs: Mapping[str, Any]) -> int:
    """Entries of the largest tensor: the unit of work in which times of micro-batches are compared."""
    return max((value.numel() for value in inputs.values() if isinstance(value, Tensor)), default=0)


def first_label(inputs: Mapping[str, Any], label_names: Collection[str]) -> Tensor | None:
    """The first label tensor, or None if the batch carries none."""
    for name in label_names:
        if isinstance(inputs.get(name), Tensor):
            return inputs[name]
    return None


def contributing(labels: Tensor) -> Tensor | None:
    """Which examples' class labels count in the loss, bool, shape ``(m,)``; None for labels that none is ignored of."""
    return labels != -100 if labels.dim() == 1 and not labels.is_floating_point() else None


def part_of(
    inputs: Mapping[str, Any],
    index: Tensor,
    examples: int,
    *,
    keep: Collection[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The inputs of some examples; the original is left as it is.

    Args:
        inputs: A batch.
        index: Positions of the examples wanted, int64.
        examples: Size of the batch: tensors whose first dimension equals it are taken apart.
        keep: Names of entries to hand on whole.
        without: Names of entries to leave out.
    """
    part = {}
    for name, value in inputs.items():
        if name in without:
            continue
        per_example = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == examples
        part[name] = value.index_select(0, index) if per_example and name not in keep else value
    return part
