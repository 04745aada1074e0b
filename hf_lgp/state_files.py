"""The predictor's files in a checkpoint folder: tensors as safetensors, counters as JSON, apart from the model's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

STATE_NAME = "lgp_state.safetensors"
COUNTERS_NAME = "lgp_state.json"


def write_state(folder: str, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Write the predictor's state into a checkpoint folder."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, os.path.join(folder, STATE_NAME))
    with open(os.path.join(folder, COUNTERS_NAME), "w", encoding="utf-8") as file:
        json.dump(counters, file)


def read_state(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_state` wrote.

    Raises:
        OSError, ValueError, SafetensorError: If there is nothing of the kind.
    """
    tensors = safetensors.torch.load_file(os.path.join(folder, STATE_NAME))
    with open(os.path.join(folder, COUNTERS_NAME), encoding="utf-8") as file:
        return tensors, json.load(file)


def frozen(value: Any) -> Any:
    """What JSON knows, with tuples for its lists."""
    if isinstance(value, Mapping):
        return {name: frozen(each) for name, each in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value
