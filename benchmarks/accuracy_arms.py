"""The arms of ``time_to_accuracy.py``: plain ``Trainer``, ``LGPTrainer``, and what is left of it without its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_lgp import LGPTrainer
from hf_lgp.plans import Plan
from hf_lgp.regression import KernelRidge


class MeanOfWindow(KernelRidge):
    """Predicts the mean of the stored gradients for every example."""

    def cross_kernel(self, features: Tensor, pullbacks: Tensor) -> Tensor:
        assert self._features is not None
        return torch.ones(len(features), len(self._features), device=features.device, dtype=features.dtype)

    def weights(self, kernel_rows: Tensor) -> Tensor:
        return kernel_rows / kernel_rows.shape[1]


class LabelOnlyRidge(KernelRidge):
    """The regression without its features: predictions depend on the residuals alone."""

    def _standardise(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)


class Ablated(LGPTrainer):
    """``LGPTrainer`` with another regression, which leaves a note of how large its first corrections were."""

    regression: type[KernelRidge]
    largest_correction = 0.0
    _looks = 8

    def _lgp_build(self, inputs: dict[str, Any]) -> Any:
        engine = super()._lgp_build(inputs)
        known = engine.predictor.regression
        engine.predictor.regression = self.regression(known.kernel, known.ridge)
        correction = engine._correction

        def noted(*args: Tensor) -> list[Tensor | None]:
            gradients = correction(*args)
            if self._looks > 0:
                self._looks -= 1
                sizes = [g.abs().max().item() for g in gradients if g is not None]
                self.largest_correction = max(self.largest_correction, *sizes)
            return gradients

        engine._correction = noted
        return engine


class Constant(Ablated):
    """The same prediction for every example: sum_all - w sum_S of it is 0, so this is the control gradient alone.

    That makes it the arm without correction too (exact gradients of the control examples only, and the head's exact gradient
    of all), at the cost of the passes that the others pay for. ``largest_correction`` is the check: 0, or rounding where the
    control weight is no whole number.
    """

    regression = MeanOfWindow


class LabelOnly(Ablated):
    regression = LabelOnlyRidge


class PathAlone(LGPTrainer):
    """The class path without the regression, at a fixed control fraction."""

    def _lgp_build(self, inputs: dict[str, Any]) -> Any:
        engine = super()._lgp_build(inputs)
        engine.controller.plan = Plan(self._lgp_settings.control_fraction, ridge=False)
        return engine


ARMS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "trainer": (Trainer, {}),
    "lgp": (LGPTrainer, {}),
    "early": (LGPTrainer, {"lgp_exact_steps": 0}),
    "longer": (LGPTrainer, {}),
    "f=0.5": (LGPTrainer, {"lgp_control_fraction": 0.5}),
    "f=0.25": (LGPTrainer, {"lgp_control_fraction": 0.25}),
    "f=0.125": (LGPTrainer, {"lgp_control_fraction": 0.125}),
    "path-alone": (PathAlone, {"lgp_control_fraction": 0.25}),
    "ridge-alone": (LGPTrainer, {"lgp_control_fraction": 0.25, "lgp_class_path": False}),
    "constant": (Constant, {"lgp_control_fraction": 0.25, "lgp_class_path": False}),
    "label-only": (LabelOnly, {"lgp_control_fraction": 0.25, "lgp_class_path": False}),
}

EPOCHS: dict[str, float] = {"longer": 1.1}
"""Arms that train for so many times the epochs of the others, on a schedule stretched alike: their steps are cheaper."""
