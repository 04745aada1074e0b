"""The method's settings, validated in one place and independent of any trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields

PREDICTORS = ("auto", "rows", "linear")
KERNELS = ("linear", "rbf")

_ROWS = 2
DOUBLINGS = 2
"""How often the number of rows that are followed may be doubled, where none was asked for."""


@dataclass(frozen=True)
class LGPSettings:
    """Settings of linear gradient prediction; the fields of ``LGPTrainingArguments`` without their ``lgp_`` prefix.

    Attributes:
        control_fraction: ``f``, share of every micro-batch with exact gradients; 1: plain training, 0: chosen by measured price.
        variance_budget: Largest relative variance that a fraction which is chosen may cause, above 1; 0: no limit.
        exact_steps: Exact optimizer steps before a fraction is followed.
        predictor: ``rows``: the row walk, an error where it is not possible; ``auto``: exact there; ``linear``: a regression as in the paper.
        groups: ``K``, means of rows that the row walk follows besides the row with the largest gradient; None: 2, or 4 or 8 where measurements say that it pays.
        single_rows: ``R``, rows that it follows one by one besides these: those with the largest gradients; None: the same.
        seed: Of the private random stream that draws the control examples.
        window: Linear predictor: recent exact examples that it is fitted on.
        rank: Linear predictor: basis vectors per side of a weight matrix.
        kernel: Linear predictor: ``linear`` is the paper's, ``rbf`` goes beyond it.
        ridge: Linear predictor: regularisation, relative to the kernel's mean diagonal.

    Raises:
        ValueError: If a value is out of range; the message says what to change.
    """

    control_fraction: float = 0.0
    variance_budget: float = 1.1
    exact_steps: int = 0
    predictor: str = "auto"
    groups: int | None = None
    single_rows: int | None = None
    seed: int = 0
    window: int = 2048
    rank: int = 16
    kernel: str = "rbf"
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
        if self.exact_steps < 0:
            raise ValueError(f"`lgp_exact_steps` must not be negative, got {self.exact_steps}. Use 0 for none.")
        for name, least in (("groups", 1), ("single_rows", 0), ("window", 2), ("rank", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
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

    @property
    def rows(self) -> tuple[int, int]:
        """``K`` and ``R`` to begin with."""
        return _ROWS if self.groups is None else self.groups, _ROWS if self.single_rows is None else self.single_rows

    @property
    def doublings(self) -> int:
        """How often both may be doubled."""
        return DOUBLINGS if self.groups is None and self.single_rows is None else 0

    @classmethod
    def from_arguments(cls, arguments: object) -> LGPSettings:
        """Read ``lgp_*`` attributes from any object; those it lacks keep their defaults."""
        names = [field.name for field in fields(cls) if hasattr(arguments, f"lgp_{field.name}")]
        return cls(**{name: getattr(arguments, f"lgp_{name}") for name in names})
