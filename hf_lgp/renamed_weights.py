"""Weights that ``Trainer`` leaves out when it resumes: a workaround for transformers issue 48805, to be removed with it.

Some models (ViT, DeiT, BEiT, Dinov2, Swin) are saved under converted names. ``Trainer`` loads its checkpoints with
``load_state_dict(strict=False)``, which knows nothing of the conversion, so that most tensors keep the values they had before,
with no more than a warning; ``from_pretrained`` loads all of them. ``tests/test_renamed_weights.py`` fails when upstream restores
them by itself.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .verify import unrandom


def restore_renamed_weights(
    model: nn.Module | None, checkpoint: str | os.PathLike[str], missing: Collection[str]
) -> bool:
    """Load the weights that are still ``missing`` through ``from_pretrained`` into the given model, in place.

    Returns:
        Whether that could be done; if not, the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    try:
        with unrandom():
            result: Any = type(model).from_pretrained(checkpoint, config=model.config, output_loading_info=True)
    except Exception:  # such as of a class that is built from more than a config
        return False
    loaded, info = result
    if any(info.get(problem) for problem in ("missing_keys", "mismatched_keys", "error_msgs")):
        return False
    weights = loaded.state_dict()
    if not weights.keys() >= set(missing):
        return False
    model.load_state_dict({name: weights[name] for name in missing}, strict=False)
    return True
