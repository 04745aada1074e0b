"""The arms of ``time_to_accuracy.py``: plain ``Trainer``, ``LGPTrainer``, and what is left of it without its parts."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_lgp import LGPTrainer

ARMS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "trainer": (Trainer, {}),
    "lgp": (LGPTrainer, {}),
    # never predicts: only the last block on one row
    "first-row": (LGPTrainer, {"lgp_exact_steps": 10**9}),
    "quarter": (LGPTrainer, {"lgp_control_fraction": 0.25}),
    "eighth": (LGPTrainer, {"lgp_control_fraction": 0.125}),
    "budget-1.05": (LGPTrainer, {"lgp_variance_budget": 1.05}),
    "early": (LGPTrainer, {"lgp_exact_steps": 0}),
    "groups-8": (LGPTrainer, {"lgp_groups": 8}),
    "linear": (LGPTrainer, {"lgp_predictor": "linear"}),
}
"""Trainer and settings by name. An arm with a schedule compressed or stretched in time has the same settings as another, and an entry in :data:`EPOCHS`."""

EPOCHS: dict[str, float] = {}
"""Epochs of an arm relative to the others', where they differ; its learning rate falls to zero within them."""

NAMES = {
    "trainer": "`Trainer`",
    "lgp": "`LGPTrainer`, automatic",
    "first-row": "exact, last block on one row",
    "quarter": "a quarter exact",
    "eighth": "an eighth exact",
    "budget-1.05": "automatic, variance budget 1.05",
    "early": "automatic, predictions from the start",
    "groups-8": "automatic, eight groups",
    "linear": "automatic, the paper's predictor",
}
"""What tables call them."""
