"""The probe: a short dry run of ``LGPTrainer`` on a copy of the model that tells whether prediction pays, and how much."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from .batches import entries_of
from .compatibility import refuse_incompatible
from .control.controller import PERIOD
from .control.plan import GROUPS, StepPlan
from .control.residual import Residual
from .estimator import FRACTIONS, control_size, relative_variance
from .session import Session
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments
from .verify import unrandom

_MOST, _TIMES = 256, 4
"""Micro-batches at most; times of a step with predictions that are believed."""


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found; ``print`` shows it as a table.

    Attributes:
        fraction: Control fraction of least price within the variance budget; 1 where exact steps are cheapest.
        residual_share: Share of the gradient's variance that predictions do not explain.
        step_times: Time of a step over that of a plain ``Trainer`` step, by control fraction; 1 stands for LGPTrainer's own exact steps.
        exact_seconds: Seconds of a plain micro-batch.
        first_row: Whether the last block runs on one row only.
        budget: Largest relative variance allowed.
        refused: Why gradients of this model cannot be predicted; None if they can.
        loader_seconds: Seconds that a micro-batch is waited for.
        rows: How often the number of rows that predictions follow is doubled.
    """

    fraction: float = 1.0
    residual_share: float = 1.0
    step_times: Mapping[float, float] = field(default_factory=lambda: {1.0: 1.0})
    exact_seconds: float = math.nan
    first_row: bool = False
    budget: float = math.inf
    refused: str | None = None
    loader_seconds: float = 0.0
    rows: int = 0

    @property
    def prices(self) -> dict[float, float]:
        """Variance times step time by control fraction; a plain ``Trainer`` step has price 1."""
        return {f: self.variance(f) * t for f, t in self.step_times.items()}

    def variance(self, fraction: float) -> float:
        """Variance of the gradient at a fraction, relative to the exact one."""
        return relative_variance(fraction, self.residual_share)

    def best(self, budget: float) -> float:
        """The fraction of least price within a variance budget."""
        return min((f for f in self.step_times if self.variance(f) <= budget), key=self.prices.__getitem__)

    @property
    def input_bound(self) -> bool:
        """Whether a micro-batch is waited for longer than its step would take."""
        return self.loader_seconds > self.exact_seconds * self.step_times[self.fraction]

    @property
    def verdict(self) -> str:
        """The finding in words."""
        if self.refused is not None:
            return f"LGPTrainer would train this model exactly: {self.refused}."
        own, price = self.step_times[self.fraction], self.prices[self.fraction]
        slow = ""
        if self.input_bound:
            slow = "Input-bound: the data loader is slower than the step. Raise `dataloader_num_workers` first. "
        if self.fraction < 1.0:
            return (
                f"{slow}Predictions pay here: with exact gradients for {self.fraction:g} of every batch a step takes {own:.2f} of "
                f"Trainer's time, and the same progress about {price:.2f} of it."
            )
        gain = f" Its exact steps take {own:.2f} of Trainer's time." if own < 0.97 else ""
        if (wider := self.best(math.inf)) < 1.0:
            return (
                f"{slow}Predictions would pay here, but not within the variance budget of {self.budget:g}: raise `lgp_variance_budget` "
                f"above {self.variance(wider):.2f}, the variance at fraction {wider:g}, or LGPTrainer will train exactly.{gain}"
            )
        return f"{slow}Predictions do not pay here: LGPTrainer would train exactly, and look now and then whether that has changed.{gain}"

    def __str__(self) -> str:
        if self.refused is not None:
            return self.verdict
        rows = [
            f"{f:>16g}{t:>11.2f}{self.variance(f):>10.3f}{self.prices[f]:>7.2f}{'  <- chosen' * (f == self.fraction)}"
            for f, t in self.step_times.items()
        ]
        said = {
            "a step of Trainer": f"{self.exact_seconds:.4f} s, the 1 of step time and price",
            "waiting for data": f"{self.loader_seconds:.4f} s per step",
            "variance explained": f"{1.0 - self.residual_share:.1%}{f', with {2**self.rows} times the rows' * (self.rows > 0)}",
            "last block runs on": "one row" if self.first_row else "all rows",
        }
        notes = [f"{name:>18}  {value}" for name, value in said.items()]
        return "\n".join(["control fraction  step time  variance  price", *rows, *notes, self.verdict])


class _Probing(LGPTrainer):
    """Measures and times whatever the controller would do, and stops as soon as it can report."""

    unit = 0.0
    waits: Sequence[float] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.device.type == "cuda":  # or what is waited for is the step before
            torch.cuda.synchronize(self.args.device)
        began = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.waits = (*self.waits, (time.perf_counter() - began) / max(1, len(samples[0])))
        return samples

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        session, self.unit = self._lgp, max(self.unit, float(entries_of(inputs)))
        assert session is not None
        session.__dict__.setdefault("plan", partial(_plan, session, session.plan))
        loss = super().training_step(model, inputs, num_items_in_batch)
        known = session.controller.residuals
        measured = len(known) > session.rules.doublings and all(each.count for each in known)
        self.control.should_training_stop |= session.method is None or measured
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: a probe has its report."""

    def report(self) -> ProbeReport:
        """What was found."""
        session = self._lgp
        assert session is not None
        if session.refused is not None:
            return ProbeReport(refused=session.refused)
        controller, budget, times_of = session.controller, session.rules.budget, session.controller.times
        plain, exact = times_of.seconds(StepPlan()), times_of.seconds(times_of.exact_plan)
        if plain is None or exact is None or not all(known.count for known in controller.residuals):
            raise ValueError("The probe could not predict anything: use a larger `per_device_train_batch_size`.")
        possible = [f for f in FRACTIONS if control_size(controller.size, f) >= 2]
        wait = statistics.median(self.waits[2:] or (0.0,))  # the first batches start the workers
        found: list[ProbeReport] = []
        for rows, known in enumerate(controller.residuals):
            times = {1.0: exact / plain, **{f: times_of.cost(f, rows) * exact / plain for f in possible}}
            report = ProbeReport(1.0, known.share, times, plain * self.unit, times_of.first_row, budget, rows=rows)
            found.append(replace(report, fraction=report.best(budget), loader_seconds=wait))
        return min(found, key=lambda report: report.prices[report.fraction])  # of equals, that of fewest rows


def _plan(session: Session, usual: Callable[..., StepPlan], step: int, *more: Any) -> StepPlan:
    """Exact steps of both kinds in turns, then a fraction, then measurements."""
    plan, controller, method = usual(step, *more), session.controller, session.method
    if method is None or session.refused is not None or controller.size < 2:
        return plan
    if controller.seen < 2 * PERIOD or not method.ready:
        return StepPlan(first_row=method.has_first_row and controller.seen % 2 == 1)
    trial = StepPlan(0.25 if control_size(controller.size, 0.25) >= 2 else 0.5, first_row=session.rules.first_row)
    if controller.times.count(trial) < _TIMES:
        return replace(trial, seed=controller.seen)
    if len(controller.residuals) <= session.rules.doublings:
        session.controller = replace(controller, residuals=(Residual(),) * (1 + session.rules.doublings))
    rows = next((k for k, known in enumerate(session.controller.residuals) if not known.count), 0)
    return StepPlan(measure=GROUPS, first_row=session.rules.first_row, rows=rows)


def probe(model: nn.Module, dataset: Any, args: TrainingArguments | None = None, **kwargs: Any) -> ProbeReport:
    """Find out in a short dry run whether predictions pay.

    Model, data set, arguments and random streams are left as they were found; nothing is written or logged.

    Args:
        model: The model as it would be trained; a copy is trained.
        dataset: Its training data set.
        args: The training arguments; batch size, precision and ``lgp_*`` settings matter. The control fraction is taken as automatic.
        kwargs: What else ``Trainer`` would be given, and ``compute_loss``, to stand in for the trainer's method of that name.

    Raises:
        ValueError: If the arguments rule predictions out, as ``LGPTrainer`` would say, or if batches are too small.
    """
    if args is not None:
        refuse_incompatible(args, model)
    own = {"compute_loss": kwargs.pop("compute_loss")} if "compute_loss" in kwargs else {}
    with tempfile.TemporaryDirectory() as folder, unrandom():
        trainer = _Probing(copy.deepcopy(model), _trial_arguments(args, folder), train_dataset=dataset, **kwargs)
        trainer.__dict__.update(own)
        trainer.train()
        return trainer.report()


def _trial_arguments(args: TrainingArguments | None, folder: str) -> LGPTrainingArguments:
    known = {f.name for f in fields(LGPTrainingArguments) if f.init}
    given = {} if args is None else {f.name: getattr(args, f.name) for f in fields(args) if f.name in known}
    off = ("eval_on_start", "logging_first_step", "load_best_model_at_end", "push_to_hub", "lgp_control_fraction")
    own: dict[str, Any] = {**dict.fromkeys(off, 0), "output_dir": folder, "report_to": "none", "disable_tqdm": True}
    own |= dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
    own["lgp_predictor"] = "linear" if given.get("lgp_predictor") == "linear" else "auto"
    own["max_steps"] = -(-_MOST // given.get("gradient_accumulation_steps", 1))
    return LGPTrainingArguments(**{**given, **own})
