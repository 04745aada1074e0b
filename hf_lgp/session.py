"""One training run with predicted gradients: from the first micro-batch, which verifies the model, to the last figure.

It knows ``torch`` only. A trainer asks for the plan of each micro-batch, runs its ordinary step inside :meth:`Session.step`, and reads figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .control.clock import Lap, mark
from .control.controller import PERIOD, Controller, Rules
from .control.exchange import holds_everywhere, mean_over_processes, same_everywhere
from .control.measurement import GroupSpread
from .control.plan import StepPlan, private_seed
from .estimator import control_size
from .methods import Method, RowWalk
from .settings import LGPSettings

_LEARNT = 4  # one in so many exact steps that a predictor goes on learning from
_AGAIN = 64  # micro-batches after which a check is tried again where it could not be made at first


@dataclass(frozen=True)
class _Reading:
    """What a micro-batch left to be read later."""

    plan: StepPlan
    at: int
    examples: int
    size: float
    lap: Lap
    whole: bool  # whether it had about as many examples as others: the last of an epoch may have few, and costs more for each
    spreads: tuple[GroupSpread, ...]


class Session:
    """The state of one run.

    Attributes:
        method: How gradients are predicted; None before the model was verified, or if it failed.
        refused: Why nothing is predicted; None while there is no reason.
        controller: What was measured and chosen.
        steps: Numbers of exact and predicted micro-batches.
        examples: Numbers of examples with exact and with predicted gradients.
    """

    def __init__(self, settings: LGPSettings, steps: int, device: torch.device, process: int = 0) -> None:
        self.settings, self.run_steps, self.device, self.process = settings, steps, device, process
        self.method: Method | None = None
        self.refused: str | None = None
        self.controller = Controller()
        self.steps = {"exact": 0, "predicted": 0}
        self.examples = {"exact": 0, "predicted": 0}
        self._readings: list[_Reading] = []
        self._waiting: list[_Reading] = []
        self._staged: tuple[list[_Reading], Tensor, Any] | None = None
        self._position = (-1, 0)
        # Kind, exact and predicted examples of the micro-batches of this optimizer step.
        self._latest: list[tuple[str, int, int]] = []
        self._ready = False  # whether the method has learnt enough in all processes
        self._learnt: Mapping[str, Tensor] | None = None
        self._asked = 0  # how often it was to be found out how to predict
        self._tried: set[int] = set()  # with which numbers of trained parameters it was
        self._entries = 0.0  # of the largest micro-batch
        self._rest = 0  # micro-batches without a plan to come, which the controller has counted
        self._saved_before = 0.0  # estimated seconds saved by the runs that this one goes on from

    @property
    def rules(self) -> Rules:
        """What the controller is asked for."""
        s = self.settings
        first_row = self.method is not None and self.method.has_first_row
        budget = s.variance_budget or float("inf")
        doublings = 0 if self.method is None or self.method.learns else s.doublings
        return Rules(s.control_fraction, budget, s.exact_steps, first_row, self.run_steps, doublings)

    def unchecked(self, trained: int) -> bool:
        """Whether it is to be found out how to predict: at first, and where it was not possible, once other parameters are trained."""
        if self.refused is not None:
            return trained not in self._tried
        self._asked += 1  # where batches have one example, this may go on for ever, and other processes are waited for
        return self._asked <= PERIOD or self._asked % _AGAIN == 0

    def use(self, method: Method | None, refused: str | None, trained: int, examples: int) -> str | None:
        """Predict with a method from here on, or not at all, for a reason; all processes end up with the same.

        Args:
            method: The method.
            refused: The reason.
            trained: Number of the model's parameters that are trained.
            examples: Those of this micro-batch, in this process.
        """
        found = [float(method is not None), method.found if isinstance(method, RowWalk) else 0.0]
        if not same_everywhere(found, self.device):
            method, refused = None, refused or "the check came to something else in another process"
        self._tried |= {trained}
        self.method, self.refused, self._ready = method, refused, False
        if method is not None and self._learnt:
            try:
                method.load_state_dict(self._learnt)
            except (KeyError, ValueError):  # of other settings: learnt anew
                self.controller, self._saved_before = Controller(), 0.0
        self._learnt = None
        sizes = mean_over_processes(torch.tensor([float(examples)], device=self.device))
        self.controller = self.controller.sized(sizes.item())
        return refused

    @property
    def reason(self) -> str | None:
        """Why nothing is predicted; None while there is no reason."""
        never = "no batch of two examples or more came to its `training_step`"
        return never if self.method is None and self.refused is None else self.refused

    def refuse(self, reason: str) -> None:
        """Predict no more."""
        self.method, self.refused = None, reason

    def plan(self, step: int, accumulation: int, skipped: bool = False) -> StepPlan:
        """The plan of the next micro-batch, given whether the latest optimizer step was skipped because gradients overflowed."""
        self._advance(step)
        if self.first_of_step:
            if skipped:
                self._take_back()
            self._latest = []
        if self.method is None:
            return StepPlan()
        self._decide(step)
        # Of what is not fitted a measurement tells nothing.
        known = self._ready or self.settings.control_fraction or not self.method.learns
        plan = self.controller.plan(self.rules, step, accumulation) if known else StepPlan()
        if plan.plain and not self.method.learns:
            return plan
        return replace(plan, seed=private_seed(self.settings.seed, *self._position, self.process))

    def _advance(self, step: int) -> None:
        self._position = step, self._position[1] + 1 if self._position[0] == step else 0

    @property
    def first_of_step(self) -> bool:
        """Whether the latest micro-batch is the first of its optimizer step."""
        return self._position[1] == 0

    def rests(self) -> bool:
        """Whether the next micro-batch needs no plan, as some that follow: of short steps, even asking for one takes a few percent."""
        if not self._rest and self.method is not None and not self.method.learns:
            if self.controller.rests(self.rules):
                self._rest, self.controller = PERIOD, self.controller.rested(PERIOD)
        return self._rest > 0

    def rested(self, step: int, examples: int) -> None:
        """Count a micro-batch that had no plan, also one whose optimizer step is skipped."""
        self._advance(step)
        self._latest = []
        self._count("exact", examples, 0)
        self._rest -= 1

    def splices(self, plan: StepPlan) -> bool:
        """Whether the model is run in another way than ``Trainer`` does."""
        if (method := self.method) is None:
            return False
        # Until it is ready, from every exact step, then from some: the others are for timing.
        return not plan.plain or (method.learns and (not method.ready or plan.seed % _LEARNT == 0))

    @contextmanager
    def step(self, plan: StepPlan, examples: int, size: float) -> Iterator[None]:
        """A context for the forward and backward of one micro-batch; nothing is counted if it fails."""
        spreads: list[GroupSpread] = []
        with ExitStack() as exits:
            if self.method is not None and self.splices(plan):
                exits.enter_context(self.method.splice(plan, spreads.append))
            began = None if self.method is None else mark(self.device)
            yield
            lap = None if self.method is None else Lap(began, mark(self.device))
        exact = control_size(examples, plan.fraction)
        self._latest.append(("predicted" if exact < examples else "exact", exact, examples - exact))
        self._count(*self._latest[-1])
        if lap is not None:
            kind = replace(plan, seed=0)
            self._entries = max(self._entries, size)
            whole = 2 * examples > self.controller.size or 2.0 * size > self._entries
            self._readings.append(_Reading(kind, self.controller.seen, examples, size, lap, whole, tuple(spreads)))
            self.controller = self.controller.advanced(plan)

    def _count(self, kind: str, exact: int, predicted: int, sign: int = 1) -> None:
        self.steps[kind] += sign
        self.examples["exact"] += sign * exact
        self.examples["predicted"] += sign * predicted

    def _take_back(self) -> None:
        """Nothing was trained with the latest micro-batches: they do not count, nor does what they measured, but for their times."""
        for counted in self._latest:
            self._count(*counted, sign=-1)
        first = max(0, len(self._readings) - len(self._latest))
        self._readings[first:] = [replace(reading, spreads=()) for reading in self._readings[first:]]

    def _decide(self, step: int) -> None:
        """Read what is due and choose. On a GPU that is of the time before last: it has arrived, so nothing waits."""
        if self.controller.seen % PERIOD:
            return
        if self.method is not None and self.method.learns and not self._ready:
            self._ready = holds_everywhere(self.method.ready, self.device)
        if self.device.type == "cuda":
            self._absorb_staged()
            if self._waiting:
                numbers = mean_over_processes(self._numbers(self._waiting))
                host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
                self._staged = self._waiting, host, mark(self.device)
            self._waiting = self._readings
        elif self._readings:
            self._absorb(self._readings, mean_over_processes(self._numbers(self._readings)))
        self._readings = []
        self.controller = self.controller.decided(self.rules, step)

    def _absorb_staged(self) -> None:
        if self._staged is not None:
            readings, numbers, arrived = self._staged
            arrived.synchronize()
            self._absorb(readings, numbers)
        self._staged = None

    def _numbers(self, readings: list[_Reading]) -> Tensor:
        """All numbers of some readings as one vector."""
        units = [r.lap.seconds() / r.size for r in readings]
        spreads = [torch.cat([s.residual, s.total]) for r in readings for s in r.spreads]
        pinned = self.device.type == "cuda"  # or the copy would wait
        known = torch.tensor([units, [r.whole for r in readings], [r.examples for r in readings]]).flatten()
        own = torch.empty(known.shape, pin_memory=pinned).copy_(known)
        return torch.cat([own.to(self.device, non_blocking=True), *spreads])

    def _absorb(self, readings: list[_Reading], numbers: Tensor) -> None:
        values, controller = numbers.tolist(), self.controller
        n = len(readings)
        units, wholes, sizes, values = values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n :]
        controller = controller.sized(max(sizes, default=0.0))
        for reading, unit, mean in zip(readings, units, wholes, strict=True):
            if whole := mean > 0.5:  # in most processes
                controller = controller.timed(reading.plan, unit, reading.at)
                controller = controller.accounted(reading.plan, unit, reading.size)
            residual: list[float] = []
            total: list[float] = []
            for spread in reading.spreads:
                n = len(spread.total)
                residual, total, values = residual + values[:n], total + values[n : 2 * n], values[2 * n :]
            if total and whole:
                controller = controller.measured(residual, total, reading.plan.measure, reading.at, reading.plan.rows)
        self.controller = controller

    @property
    def _measured(self) -> list[Any]:
        """What shares of variance were measured of: others tell nothing of it."""
        s = self.settings
        return [s.kernel, s.ridge, s.window, s.rank] if s.predictor == "linear" else [*s.rows]

    def figures(self) -> dict[str, float]:
        """What to log, by name: the fraction alone while nothing is predicted."""
        if self.method is None:
            return {"fraction": 1.0}
        controller, fixed = self.controller, self.settings.control_fraction
        fraction = 1.0 if self._position[0] < self.settings.exact_steps else fixed or controller.fraction
        figures = {"fraction": fraction}
        if fraction < 1.0:
            if controller.measurements:
                figures["variance_explained"] = 1.0 - controller.residual_share
                figures["variance"] = controller.variance(fraction)
            plain = controller.times.seconds(StepPlan())
            own = controller.times.seconds(StepPlan(fraction, rows=controller.rows))
            if plain and own and not fixed:
                figures |= {"step_time": own / plain, "seconds_saved": controller.saved}
        return {name: round(value, 6) for name, value in figures.items()}

    def shares(self) -> dict[str, float]:
        """Of all micro-batches and of all examples, the shares with predicted gradients; nothing if there were none."""
        if not self.examples["predicted"]:
            return {}
        counts = {"steps_predicted": self.steps, "examples_predicted": self.examples}
        return {name: round(count["predicted"] / sum(count.values()), 6) for name, count in counts.items()}

    @property
    def saved(self) -> float | None:
        """Estimated seconds that this run has saved since it began or went on; None where nothing tells."""
        told = not self.settings.control_fraction and self.controller.times.seconds(StepPlan()) is not None
        return self.controller.saved - self._saved_before if told else None

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors, and numbers as JSON knows them. All processes call this together."""
        self.controller, self._rest = self.controller.rested(-self._rest), 0  # the next run may have no rest
        self._absorb_staged()
        if readings := self._waiting + self._readings:
            self._absorb(readings, mean_over_processes(self._numbers(readings)))
        self._waiting, self._readings = [], []
        state = {"controller": asdict(self.controller), "measured": self._measured}
        state |= {"steps": self.steps, "examples": self.examples}
        return ({} if self.method is None else self.method.state_dict()), state

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; tensors go to the method once the model is verified.

        Raises:
            KeyError, TypeError: If the state is another version's.
        """
        counts = [{name: int(numbers[kind][name]) for name in self.steps} for kind in ("steps", "examples")]
        controller = Controller.from_state_dict(numbers["controller"])
        self.steps, self.examples = counts
        if numbers["measured"] == self._measured:
            self.controller, self._learnt = controller.resumed(), tensors
        self._saved_before = self.controller.saved
