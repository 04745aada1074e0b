"""The probe: does prediction pay for this model and these data, and how much?

A short dry run of :class:`~hf_lgp.LGPTrainer` on a copy of the model: a warm-up, some exact steps to time, and a few dozen steps with
predictions. It answers for the model as it is now; predictions are best early in training.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from .batches import entries
from .engine import LGPEngine
from .plans import EXACT, Plan
from .rules import part_name
from .settings import LGPSettings
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments

_TRIAL_STEPS = 100
"""Micro-batches with predictions at most; it ends as soon as they are timed."""


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        plan: The plan of least price within the variance budget.
        price: Its variance times its cost, relative to exact training, whose price is 1.
        cost: Time of its step over that of an exact step.
        kappa: Cost of one prediction, all overhead included, in exact examples.
        rho2: Share of the gradient's variance that predictions explain, half of it that in the worst part.
        rho2_by_block: The share that predictions explain of every part of the model, mean over the part's tensors.
        exact_seconds: Time of an exact micro-batch.
        memory_mib: Memory of the predictor's window and bases.
        coverage: Share of the trunk's trainable parameters that have a prediction rule.
        on_path: Whether the class-token path is followed.
        beyond_budget: Plan, price and variance of what would pay if there were no variance budget, where nothing pays within it; else None.
    """

    plan: Plan
    price: float
    cost: float
    kappa: float
    rho2: float
    rho2_by_block: dict[str, float]
    exact_seconds: float
    memory_mib: float
    coverage: float
    on_path: bool
    beyond_budget: tuple[Plan, float, float] | None = None

    @property
    def verdict(self) -> str:
        """The finding in words."""
        if self.beyond_budget is not None:
            plan, price, variance = self.beyond_budget
            return (
                f"Predictions would pay here, but not within the variance budget: with exact gradients for {plan.fraction:.3g} of every "
                f"batch the same progress would take about {price:.2f} of the time, with a gradient of {variance:.2f} times the "
                "variance of the exact one. LGPTrainer would train exactly; to have it predict, raise `lgp_variance_budget` above that."
            )
        if self.plan.exact:
            return (
                "Predictions do not pay here: LGPTrainer would train exactly, and look now and then whether that has changed. "
                f"One prediction costs {self.kappa:.2f} of an exact example and explains {self.rho2:.2f} of the gradient's variance."
            )
        return (
            f"Predictions pay here: with exact gradients for {self.plan.fraction:.3g} of every batch a step takes {self.cost:.2f} of "
            f"an exact one, and the same progress about {self.price:.2f} of the time."
        )

    def __str__(self) -> str:
        rows = [
            ("control fraction", f"{self.plan.fraction:.3g}"),
            ("step, in exact steps", f"{self.cost:.3f}"),
            ("prediction, in exact examples (kappa)", f"{self.kappa:.3f}"),
            ("variance explained (rho2)", f"{self.rho2:.3f}"),
            *((f"  {name}", f"{value:.3f}") for name, value in self.rho2_by_block.items()),
            ("expected price (exact training: 1)", f"{self.price:.3f}"),
            ("exact micro-batch", f"{self.exact_seconds:.4f} s"),
            ("predictor's memory", f"{self.memory_mib:.0f} MiB"),
            ("parameters with a rule", f"{self.coverage:.1%}"),
            ("class-token path", "followed" if self.on_path else "none: regression alone"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), self.verdict])


class _Probing(LGPTrainer):
    """Tries a plan with predictions whatever its expected price, and reports before its engine is gone."""

    report: ProbeReport | None = None
    _trial = False
    _unit = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        engine = self._lgp_engine
        if engine is not None and not self._trial and engine.review.reviews > 0:
            self._trial = True
        if self._trial and engine is not None:
            if engine.controller.costs.timed:
                self.control.should_training_stop = True
            elif engine.controller.plan.exact:
                engine.controller.plan = Plan(0.25, ridge=engine.path is None)
        self._unit = max(self._unit, entries(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def _lgp_build(self, inputs: dict[str, Any]) -> LGPEngine:
        engine = super()._lgp_build(inputs)
        engine.controller.insists = True
        return engine

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: a probe has its report."""

    def _lgp_close(self) -> None:
        if self._lgp_engine is not None and self._trial and not self._lgp_exhausted and sys.exc_info()[0] is None:
            self._lgp_engine.review.now()
            names = {id(p): name for name, p in self._lgp_model.named_parameters()}
            self.report = _report(self._lgp_engine, names, self._unit)
        super()._lgp_close()


def _report(engine: LGPEngine, names: dict[int, str], unit: int) -> ProbeReport:
    controller, predictor = engine.controller, engine.predictor
    tried = next(iter(controller.costs.timed), Plan(0.25, ridge=engine.path is None))
    controller.plan = EXACT  # no bonus for having been tried
    plan, beyond = controller.best(), None
    if plan.exact and not (unlimited := controller.best(budget=math.inf)).exact:
        variance = controller.variance(unlimited)
        tried, beyond = unlimited, (unlimited, variance * controller.costs.relative(unlimited), variance)
    controller.plan = plan
    shown = tried if plan.exact else plan
    cost, rho2 = controller.costs.relative(plan), controller.rho2[shown.ridge].share
    kappa = (controller.costs.relative(shown) - shown.fraction) / (1.0 - shown.fraction)
    explained = (predictor.alignment.rho2 if shown.ridge else predictor.alignment.path_rho2).tolist()
    blocks: dict[str, list[float]] = {}
    for rule, value in zip(engine.rules, explained, strict=True):
        blocks.setdefault(part_name(names[id(rule.parameters[0])]), []).append(value)
    return ProbeReport(
        plan=plan,
        price=controller.price,
        cost=cost,
        kappa=kappa,
        rho2=rho2,
        rho2_by_block={name: sum(values) / len(values) for name, values in blocks.items()},
        exact_seconds=(controller.costs.seconds(EXACT) or math.nan) * unit,
        memory_mib=sum(t.numel() * t.element_size() for t in predictor.state_dict().values()) / 2**20,
        coverage=engine.coverage,
        on_path=engine.path is not None,
        beyond_budget=beyond,
    )


def probe(model: nn.Module, dataset: Any, args: TrainingArguments | None = None, **kwargs: Any) -> ProbeReport:
    """Find out in a short dry run whether predictions pay.

    Model, data set, arguments and all random streams are left as they were found; nothing is written or logged.

    Args:
        model: The model as it would be trained, on the CPU or on the device it is trained on; a copy is trained.
        dataset: Its training data set.
        args: The training arguments; batch size, precision and ``lgp_*`` settings matter. ``lgp_control_fraction`` is taken as
            automatic.
        kwargs: What else ``Trainer`` would be given: a data collator, a loss function.

    Raises:
        ValueError: If the run is not suited to predictions, as :class:`LGPTrainer` would say, or if the data set is too small for
            a batch of two examples.
        HeadNotFoundError: If no unique linear head produces the logits.
    """
    with tempfile.TemporaryDirectory() as folder, _random_streams_kept():
        trial = _trial_arguments(args, folder)
        trainer = _Probing(copy.deepcopy(model), trial, train_dataset=dataset, **kwargs)
        trainer.train()
        if trainer.report is None:
            raise ValueError(
                "The probe could not make a prediction: the batches are too small, carry no labels, or memory ran out. Use a "
                "larger `per_device_train_batch_size`, or see the warnings above."
            )
        return trainer.report


def _trial_arguments(args: TrainingArguments | None, folder: str) -> LGPTrainingArguments:
    known = {f.name for f in fields(LGPTrainingArguments) if f.init}
    given = {} if args is None else {f.name: getattr(args, f.name) for f in fields(args) if f.name in known}
    settings = LGPSettings.from_arguments(args).resolved(on_path=False)  # the longer warm-up of the two
    examples = given.get("per_device_train_batch_size", 8)
    watched = min(examples, settings.observe_examples)
    micro_batches = -(-settings.warmup_examples // watched) + 16 + _TRIAL_STEPS
    return LGPTrainingArguments(
        **{
            **given,
            "output_dir": folder,
            "lgp_control_fraction": 0.0,
            "lgp_exact_steps": 0,
            "max_steps": -(-micro_batches // given.get("gradient_accumulation_steps", 1)),
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": "none",
            "disable_tqdm": True,
            "deepspeed": None,
        }
    )


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
