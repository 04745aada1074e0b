"""The method's settings, validated in one place and independent of any trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .regression import KERNELS, Kernel

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
        exact_steps: Optimizer steps at the start that are exact, whatever the price, before an automatic control fraction: gradients are largest
            there, and Adam remembers their noise for a thousand steps. None for a tenth of the run, 100 at most. A fixed fraction
            begins when the predictor is ready.
        window: Number of recent exact examples the regression is fitted on, at least 1.
        rank: Basis vectors per side of a weight matrix's factored coordinates, at least 1.
        kernel: ``"linear"`` or ``"rbf"``.
        ridge: Regularisation, relative to the kernel's mean diagonal; positive.
        memory_steps: Micro-batches after which an exact example's say in predictions has faded to 1/e, at least 1.
        warmup_examples: Exact examples to gather before the first prediction, the steps until then being exact; 0 to choose: 128 where the
            class path does most of the work and a fraction is chosen by what is measured, 512 otherwise, or the window if that is less. No more than the window.
        observe_examples: Largest number of exact examples observed per micro-batch, at least 2.
        observe_steps: Micro-batches between two that the predictor takes exact examples from, once it predicts; 0 to choose:
            8 where the class path does most of the work, 1 where the regression is alone.
        refit_steps: Micro-batches between two fits of the regression; 0 to choose: 16 with the class path, 4 without.
        basis_steps: Micro-batches between two moves of the bases; 0 to choose: 16 with the class path, 12 without.
        class_path: Whether to use the class-token path where the model has one.
        seed: Seed of the private random stream that draws the control examples.
        head: Qualified name of the classification head; empty to find it.

    Raises:
        ValueError: If a value is out of range; the message says what to change.
    """

    control_fraction: float = 0.0
    variance_budget: float = 1.05
    exact_steps: int | None = None
    window: int = 2048
    rank: int = 16
    kernel: Kernel = "rbf"
    ridge: float = 0.03
    memory_steps: int = 256
    warmup_examples: int = 0
    observe_examples: int = 64
    observe_steps: int = 0
    refit_steps: int = 0
    basis_steps: int = 0
    class_path: bool = True
    seed: int = 0
    head: str = ""

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
        for name in ("window", "rank", "memory_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`lgp_{name}` must be at least 1, got {getattr(self, name)}.")
        if self.exact_steps is not None and self.exact_steps < 0:
            raise ValueError(
                f"`lgp_exact_steps` must not be negative, got {self.exact_steps}. Leave it out to have it chosen."
            )
        for name in ("warmup_examples", "observe_steps", "refit_steps", "basis_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`lgp_{name}` must be at least 1, or 0 to choose, got {getattr(self, name)}.")
        if self.observe_examples < 2:
            raise ValueError(
                f"`lgp_observe_examples` must be at least 2 (variances are taken over them), got {self.observe_examples}."
            )
        if not self.ridge > 0:
            raise ValueError(f"`lgp_ridge` must be positive, got {self.ridge}.")
        if self.kernel not in KERNELS:
            raise ValueError(f"`lgp_kernel` must be one of {', '.join(KERNELS)}, got {self.kernel!r}.")
        if self.warmup_examples > self.window:
            raise ValueError(
                f"`lgp_warmup_examples` ({self.warmup_examples}) cannot exceed `lgp_window` ({self.window}): "
                "lower the first or raise the second."
            )

    @property
    def automatic(self) -> bool:
        """Whether the control fraction is chosen by price."""
        return self.control_fraction == 0.0

    def exact_steps_of(self, steps: int) -> int:
        """Optimizer steps that are exact before an automatic control fraction.

        Args:
            steps: Optimizer steps of the whole run.
        """
        return min(steps // _EXACT_SHARE, _MOST_EXACT_STEPS) if self.exact_steps is None else self.exact_steps

    def resolved(self, on_path: bool) -> LGPSettings:
        """These settings with every 0 that stands for a choice replaced.

        What changes fast is the regression's part: with a class path that is a small remainder.

        Args:
            on_path: Whether the class path is followed.
        """
        observe, refit, basis = (8, 16, 16) if on_path else (1, 4, 12)
        warmup = 128 if on_path and self.automatic else 512
        return replace(
            self,
            warmup_examples=self.warmup_examples or min(warmup, self.window),
            observe_steps=self.observe_steps or observe,
            refit_steps=self.refit_steps or refit,
            basis_steps=self.basis_steps or basis,
        )

    @classmethod
    def from_arguments(cls, arguments: object) -> LGPSettings:
        """Read ``lgp_*`` attributes from any object; those it lacks keep their defaults."""
        values = {
            field.name: getattr(arguments, f"lgp_{field.name}")
            for field in fields(cls)
            if hasattr(arguments, f"lgp_{field.name}")
        }
        return cls(**values)
