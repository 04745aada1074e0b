"""The method's settings, validated in one place and independent of any trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

PREDICTORS = ("auto", "rows", "linear")

Kernel = Literal["linear", "rbf"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

_EXACT_SHARE = 10
"""A run begins with exact steps: one in so many of its optimizer steps, ..."""

_MOST_EXACT_STEPS = 100
"""... and at most so many."""


@dataclass(frozen=True)
class LGPSettings:
    """Settings of linear gradient prediction; the fields of ``LGPTrainingArguments`` without their ``lgp_`` prefix.

    Attributes:
        control_fraction: Share ``f`` of every micro-batch that gets exact gradients, in (0, 1]; 1 is plain training, 0 chooses by
            measured price, exact steps included.
        variance_budget: Largest variance of the gradient, relative to the exact one, that an automatic control fraction may cause,
            above 1; 0 for no limit.
        exact_steps: Optimizer steps at the start that are exact before an automatic control fraction: gradients are largest
            there, and Adam remembers their noise. None for a tenth of the run, 100 at most.
        predictor: ``"auto"``: the row walk where a model's stack of blocks is found and verified, exact steps elsewhere. ``"rows"``: the same, an error
            elsewhere. ``"linear"``: the paper's predictor.
        groups: ``K``, mean rows that the row walk follows besides the first row, at least 1.
        seed: Seed of the private random stream that draws the control examples.
        window: Recent exact examples that the linear predictor is fitted on, at least 2.
        rank: Basis vectors per side of a weight matrix in which it stores gradients, at least 1.
        kernel: ``"linear"`` (the paper's) or ``"rbf"``.
        ridge: Its regularisation, relative to the kernel's mean diagonal; positive.

    Raises:
        ValueError: If a value is out of range; the message says what to change.
    """

    control_fraction: float = 0.0
    variance_budget: float = 1.1
    exact_steps: int | None = None
    predictor: str = "auto"
    groups: int = 4
    seed: int = 0
    window: int = 2048
    rank: int = 16
    kernel: Kernel = "rbf"
    ridge: float = 0.03

    def __post_init__(self) -> None:
        if not 0.0 <= self.control_fraction <= 1.0:
            raise ValueError(
                f"`lgp_control_fraction` must lie in [0, 1], got {self.control_fraction}. Use 1 for plain, exact training, 0 to "
                "have it chosen."
            )
        if self.variance_budget != 0.0 and not self.variance_budget > 1.0:
            raise ValueError(
                f"`lgp_variance_budget` must exceed 1, the variance of exact training, got {self.variance_budget}. Use "
                "`lgp_control_fraction=1` for that, or 0 for no limit."
            )
        if self.exact_steps is not None and self.exact_steps < 0:
            raise ValueError(
                f"`lgp_exact_steps` must not be negative, got {self.exact_steps}. Leave it out to have it chosen."
            )
        for name, least in (("groups", 1), ("window", 2), ("rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`lgp_{name}` must be at least {least}, got {getattr(self, name)}.")
        if not self.ridge > 0:
            raise ValueError(f"`lgp_ridge` must be positive, got {self.ridge}.")
        for name, known in (("predictor", PREDICTORS), ("kernel", KERNELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`lgp_{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")

    @property
    def demanded(self) -> bool:
        """Whether a model that cannot be predicted is an error."""
        return 0.0 < self.control_fraction < 1.0 or self.predictor != "auto"

    def exact_steps_of(self, steps: int) -> int:
        """Optimizer steps that are exact before an automatic control fraction.

        Args:
            steps: Optimizer steps of the whole run.
        """
        return min(steps // _EXACT_SHARE, _MOST_EXACT_STEPS) if self.exact_steps is None else self.exact_steps

    @classmethod
    def from_arguments(cls, arguments: object) -> LGPSettings:
        """Read ``lgp_*`` attributes from any object; those it lacks keep their defaults."""
        names = [field.name for field in fields(cls) if hasattr(arguments, f"lgp_{field.name}")]
        return cls(**{name: getattr(arguments, f"lgp_{name}") for name in names})
