"""What kinds of steps cost: the latest times of each, and an estimate where one was not timed yet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..estimator import FRACTIONS
from ..settings import DOUBLINGS
from .plan import GROUPS, StepPlan

_KEPT = 15  # latest times of each kind of step whose median counts
_FASTER = 0.97  # time of an exact step with its last block on one row over that of a plain one, below which it is worth a plan
_KAPPA = 0.40  # of a prediction, in exact examples, before any was timed: that of large models

REHEARSAL = StepPlan(measure=2)
"""An exact step that tells by its time whether operations or their number are dear, before anything dearer is tried."""


@dataclass(frozen=True)
class StepTimes:
    """Times per unit of work."""

    latest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by kind of step
    first_row: bool = False  # whether exact steps are faster with the last block on one row; compiled ones may not be

    def count(self, plan: StepPlan) -> int:
        """How many times of a kind of step are known."""
        return len(self.latest.get(_kind(plan), ()))

    def seconds(self, plan: StepPlan) -> float | None:
        """Median time of a kind of step; None if it was not timed."""
        times = self.latest.get(_kind(plan), ())
        return statistics.median(times) if times else None

    @property
    def exact_plan(self) -> StepPlan:
        """The cheaper of the two kinds of exact steps."""
        return StepPlan(first_row=self.first_row)

    def as_exact(self, plan: StepPlan) -> float | None:
        """Time of an exact step that does something besides over the cheaper one that does not: the least, as it is done rarely and first times are long.

        None if that was not timed.
        """
        exact, own = self.seconds(self.exact_plan), self.latest.get(_kind(plan))
        return min(own) / exact if own and exact else None

    def cost(self, fraction: float, rows: int) -> float:
        """Time of a step with predictions, whose number of followed rows is doubled so often, over that of the cheaper exact step: measured, or else estimated.

        The rehearsal has what does not depend on the number of examples twice, for control examples and walk. What more rows cost is seen in the measurements.
        """
        exact = self.seconds(self.exact_plan)
        if exact is None:
            return 1.0
        if (own := self.seconds(StepPlan(fraction, rows=rows))) is not None:
            return own / exact
        tried = [
            (other != rows, abs(math.log(f / fraction)), f, other, t)
            for other in range(DOUBLINGS + 1)
            for f in FRACTIONS
            if (t := self.seconds(StepPlan(f, rows=other))) is not None
        ]
        if tried:  # linear in the fraction, exact steps being the other end
            _, _, near, other, time = min(tried)
            kappa = (time / exact - near) / (1.0 - near) + self._walk(rows) - self._walk(other)
            return fraction + (1.0 - fraction) * kappa
        trial = self.as_exact(REHEARSAL)
        fixed = 0.0 if trial is None else min(1.0, max(0.0, (trial - 1.3) / 3.4))
        return 2.7 * fixed + (1.0 - fixed) * (fraction + (1.0 - fraction) * _KAPPA) + self._walk(rows)

    def _walk(self, rows: int) -> float:
        """What more rows cost, in exact steps."""
        few, many = (self.as_exact(StepPlan(measure=GROUPS, rows=each)) for each in (0, rows))
        return 0.0 if few is None or many is None else max(0.0, many - few)

    def timed(self, plan: StepPlan, unit: float) -> StepTimes:
        """With one more time."""
        kind = _kind(plan)
        later = replace(self, latest={**self.latest, kind: (*self.latest.get(kind, ()), unit)[-_KEPT:]})
        plain, first = later.seconds(StepPlan()), later.seconds(StepPlan(first_row=True))
        return replace(later, first_row=first is not None and plain is not None and first < _FASTER * plain)

    def last_only(self, *plans: StepPlan) -> StepTimes:
        """Without all but the last time of some kinds of steps, or of all."""
        kinds = {_kind(plan) for plan in plans} or set(self.latest)
        return replace(self, latest={k: times[-1:] if k in kinds else times for k, times in self.latest.items()})

    def without(self, *signs: str) -> StepTimes:
        """Without those of steps in whose kind one of these occurs: ``groups``, or ``0.`` as in any fraction."""
        kept = {kind: times for kind, times in self.latest.items() if not any(sign in kind for sign in signs)}
        return replace(self, latest=kept)


def _kind(plan: StepPlan) -> str:
    """A kind of step, as a name; the last block is on one row wherever examples go different ways and it can be."""
    name = f"{plan.fraction:g}{' first row' * (plan.first_row and not plan.splits)}"
    return f"{name}{f' {plan.measure} groups' * (plan.measure > 0)}{f' {plan.rows} doublings' * (plan.rows > 0)}"
