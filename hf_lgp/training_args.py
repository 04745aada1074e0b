"""``LGPTrainingArguments``: ``TrainingArguments`` with the settings of linear gradient prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .settings import LGPSettings


@dataclass
class LGPTrainingArguments(TrainingArguments):
    """Arguments of :class:`~hf_lgp.LGPTrainer`.

    Every argument of ``TrainingArguments`` keeps its meaning and default. See ``hf_lgp.settings.LGPSettings`` for the ranges.

    Raises:
        ValueError: If an ``lgp_*`` value is out of range; the message says what to change.
    """

    lgp_control_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of every micro-batch that gets exact gradients, in (0, 1]. 1 is plain Trainer, bit for bit. "
            "0: choose by measured price, exact steps where nothing pays."
        },
    )
    lgp_variance_budget: float = field(
        default=1.05,
        metadata={
            "help": "Largest variance of the gradient, relative to the exact one, that the automatic choice may cause, above 1. "
            "0: no limit."
        },
    )
    lgp_exact_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps at the start that are exact before the automatic choice begins: gradients are largest there, and "
            "Adam remembers their noise. Default: a tenth of the run, 100 at most. A fixed fraction begins as soon as it can."
        },
    )
    lgp_window: int = field(
        default=2048, metadata={"help": "Number of recent exact examples that the gradient predictor is fitted on."}
    )
    lgp_rank: int = field(
        default=16,
        metadata={"help": "Basis vectors per side of a weight matrix in which its per-example gradients are stored."},
    )
    lgp_kernel: str = field(
        default="rbf",
        metadata={"help": "Kernel of the predictor in the head's input features.", "choices": ["linear", "rbf"]},
    )
    lgp_ridge: float = field(
        default=0.03, metadata={"help": "Regularisation of the predictor, relative to the kernel's mean diagonal."}
    )
    lgp_memory_steps: int = field(
        default=256,
        metadata={"help": "Micro-batches after which an exact example's say in predictions has faded to 1/e."},
    )
    lgp_warmup_examples: int = field(
        default=0,
        metadata={
            "help": "Exact examples to gather before the first prediction; steps until then are exact. "
            "0: 128 with the class path and an automatic fraction, 512 otherwise."
        },
    )
    lgp_observe_examples: int = field(
        default=64, metadata={"help": "Largest number of exact examples that the predictor takes from one micro-batch."}
    )
    lgp_observe_steps: int = field(
        default=0,
        metadata={
            "help": "Micro-batches between two that the predictor takes exact examples from. "
            "0: 8 with the class path, 1 without."
        },
    )
    lgp_refit_steps: int = field(
        default=0,
        metadata={"help": "Micro-batches between two fits of the predictor. 0: 16 with the class path, 4 without."},
    )
    lgp_basis_steps: int = field(
        default=0,
        metadata={
            "help": "Micro-batches between two moves of the bases that gradients are stored in. "
            "0: 16 with the class path, 12 without."
        },
    )
    lgp_class_path: bool = field(
        default=True,
        metadata={
            "help": "Compute the gradient along the class token, with four mean rows for all others, in models whose head reads it."
        },
    )
    lgp_seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the private random stream that draws the control examples; other streams stay untouched."
        },
    )
    lgp_head: str = field(
        default="",
        metadata={
            "help": "Qualified name of the classification head, an nn.Linear. Empty: find it by a probe forward."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        LGPSettings.from_arguments(self)
