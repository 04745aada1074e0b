"""``LGPTrainingArguments``: ``TrainingArguments`` with the settings of linear gradient prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .settings import KERNELS, PREDICTORS, LGPSettings


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class LGPTrainingArguments(TrainingArguments):
    """Arguments of ``LGPTrainer``.

    Every argument of ``TrainingArguments`` keeps its meaning and default. See ``hf_lgp.LGPSettings`` for the ranges.

    Raises:
        ValueError: If an ``lgp_*`` value is out of range; the message says what to change.
    """

    lgp_control_fraction: float = _setting(
        0.0,
        "Share of every micro-batch that gets exact gradients. 0 chooses it while training, and trains exactly where nothing pays; 1 is plain "
        "Trainer, bit for bit.",
    )
    lgp_variance_budget: float = _setting(
        1.1,
        "Largest variance of the gradient, relative to the exact one, that the automatic choice may cause, above 1. 0: no limit.",
    )
    lgp_exact_steps: int = _setting(
        0, "Optimizer steps at the start that are exact, before a fraction is followed, be it fixed or chosen."
    )
    lgp_predictor: str = _setting(
        "auto",
        "auto: the row walk where the model's blocks are found and verified, exact steps elsewhere. rows: the same, an error elsewhere. "
        "linear: a regression as in the paper.",
        choices=list(PREDICTORS),
    )
    lgp_groups: int | None = _setting(
        None,
        "Means of rows that the row walk follows besides the row of a sequence with the largest gradient; by default 2, or 4 or 8 where "
        "measurements say that it pays.",
    )
    lgp_single_rows: int | None = _setting(
        None, "Rows that it follows one by one besides these: those with the largest gradients; by default the same."
    )
    lgp_seed: int = _setting(0, "Seed of the private random stream that draws control examples; others stay untouched.")
    lgp_window: int = _setting(2048, "Linear predictor: recent exact examples that it is fitted on.")
    lgp_rank: int = _setting(16, "Linear predictor: basis vectors per side of a weight matrix.")
    lgp_kernel: str = _setting(
        "rbf", "Linear predictor: kernel in the features; linear is the paper's.", choices=list(KERNELS)
    )
    lgp_ridge: float = _setting(0.03, "Linear predictor: regularisation, relative to the kernel's mean diagonal.")

    def __post_init__(self) -> None:
        super().__post_init__()
        LGPSettings.from_arguments(self)
