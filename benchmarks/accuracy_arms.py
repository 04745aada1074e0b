"""The arms of ``time_to_accuracy.py``: plain ``Trainer``, ``LGPTrainer``, what is left of it without its parts, and what else shortens a run."""

from __future__ import annotations

from typing import Any

from infobatch import InfoBatchTrainer
from noise import NoisyTrainer
from transformers import Trainer

from hf_lgp import LGPTrainer

ARMS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "trainer": (Trainer, {}),
    "lgp": (LGPTrainer, {}),
    # never predicts: only the last block on one row
    "first-row": (LGPTrainer, {"lgp_exact_steps": 10**9}),
    "quarter": (LGPTrainer, {"lgp_control_fraction": 0.25}),
    "eighth": (LGPTrainer, {"lgp_control_fraction": 0.125}),
    # exact gradients with as much noise as those of "eighth" have
    "noise": (NoisyTrainer, {"lgp_control_fraction": 0.125}),
    # the remedy where noise costs accuracy
    "longer": (LGPTrainer, {}),
    # noise raises Adam's second moment, which is as if the learning rate were lower
    "faster": (LGPTrainer, {}),
    "trainer-faster": (Trainer, {}),
    "trainer-slower": (Trainer, {}),
    "budget-1.05": (LGPTrainer, {"lgp_variance_budget": 1.05}),
    "sixteenth": (LGPTrainer, {"lgp_control_fraction": 0.0625}),
    "budget-1.25": (LGPTrainer, {"lgp_variance_budget": 1.25}),
    "late": (LGPTrainer, {"lgp_exact_steps": 25}),
    "means-only": (LGPTrainer, {"lgp_single_rows": 0}),
    "linear": (LGPTrainer, {"lgp_predictor": "linear"}),
    # what a sceptic would do with the time that LGPTrainer takes
    "compressed": (Trainer, {}),
    "small-batch": (Trainer, {}),
    "infobatch": (InfoBatchTrainer, {}),
}
"""Trainer and settings by name. An arm with another schedule or learning rate has the same settings as another, and an entry in :data:`EPOCHS` or :data:`RATE`."""

EPOCHS: dict[str, float] = {"longer": 1.1, "compressed": 0.52, "small-batch": 0.52, "infobatch": 0.52}
"""Epochs of an arm relative to the others', where they differ; its learning rate falls to zero within them."""

RATE: dict[str, float] = {"faster": 1.25, "trainer-faster": 1.25, "trainer-slower": 0.8}
"""Learning rate of an arm relative to the others', where it differs."""

BATCH: dict[str, float] = {"small-batch": 0.25}
"""Batch size of an arm relative to the others', where it differs."""

NAMES = {
    "trainer": "`Trainer`",
    "lgp": "`LGPTrainer`, automatic",
    "first-row": "exact steps, the last block on one row",
    "quarter": "a quarter exact",
    "eighth": "an eighth exact",
    "noise": "exact, with the noise of an eighth",
    "longer": "automatic, a tenth more epochs",
    "faster": "automatic, the learning rate times 1.25",
    "trainer-faster": "`Trainer`, the learning rate times 1.25",
    "trainer-slower": "`Trainer`, the learning rate times 0.8",
    "budget-1.05": "automatic, variance budget 1.05",
    "sixteenth": "a sixteenth exact",
    "budget-1.25": "automatic, variance budget 1.25",
    "late": "automatic, the first 25 steps exact",
    "means-only": "automatic, no rows by themselves",
    "linear": "automatic, the paper's predictor",
    "compressed": "`Trainer`, schedule compressed to half",
    "small-batch": "`Trainer`, half the epochs, a quarter of the batch",
    "infobatch": "`Trainer` with InfoBatch, half the epochs",
}
"""What tables call them."""
