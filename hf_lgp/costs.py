"""What a micro-batch costs under each plan, from measured times."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from .plans import EXACT, Plan

OBSERVED = Plan(1.0, ridge=True)
"""Stands for exact steps that the predictor learns from."""

REHEARSED = Plan(0.0)
"""Stands for predictions of a whole micro-batch that are thrown away."""

REHEARSED_PART = Plan(0.0, ridge=True)
"""The same of a part of one, which tells how much of a pass's time does not depend on the number of its examples."""

PART = 4
"""That part is one so-manieth."""

REHEARSALS = 2
"""So many of each are made in a row, and kept: the first sets up what the second reuses."""

_KEPT = 48
"""Readings kept of each plan: some cycles of refits and basis moves, which are dear and rare."""

_KEPT_EXACT = 16
"""The same of exact steps: few, so that they tell of the machine as it is now."""

_ENOUGH = 10
"""Readings that make a plan known."""

_ENOUGH_IF_DEAR = 4
"""The same where none of them is below the time of an exact step."""

_OUTLIER = 5.0
"""A reading beyond so many medians among few is the machine's, not the plan's: the largest counts for nothing, others as that much."""

_RARE = 24
"""Nor is one of so many, the largest: a new epoch. What a plan itself does now and then comes more often."""

_PREDICTION = 0.4
"""A prediction in units of an exact example, where none was timed: a forward pass and a little more."""

_SLOPE = 0.7
"""What another control example instead of a prediction costs, in units of an exact example, about a plan that was timed."""

_RIDGE = 0.03
"""The regression's part in a step, in units of an exact step, before it was timed."""


class Costs:
    """Seconds of one unit of work (an entry of the model's input) by plan; those not yet timed are put together from others."""

    def __init__(self) -> None:
        self._readings: dict[Plan, deque[float]] = {}

    def record(self, plan: Plan, seconds: float) -> None:
        """Note the time of one micro-batch, per unit."""
        self._readings.setdefault(plan, _empty(plan)).append(seconds)

    def seconds(self, plan: Plan) -> float | None:
        """Mean time of a micro-batch per unit, rare dear parts included; None if too few were timed.

        Of exact steps too the mean: with accumulation the last micro-batch of an optimizer step is the dearest. Of rehearsals, of which the
        first are slower, the least.
        """
        readings = self._readings.get(plan, ())
        if not readings:
            return None
        if plan.fraction == 0.0:
            return min(readings)
        if not plan.exact and len(readings) < _ENOUGH:
            exact = self.seconds(EXACT)
            if exact is None or len(readings) < _ENOUGH_IF_DEAR or min(readings) < exact:
                return None
        most = self._most(plan)
        return statistics.fmean(min(reading, most) for reading in readings)

    def own(self, plan: Plan, seconds: float) -> float:
        """What of a reading is the plan's own time, interruptions left out."""
        return min(seconds, self._most(plan)) if self._readings.get(plan) else seconds

    def _most(self, plan: Plan) -> float:
        """The most that a reading of the plan counts for."""
        readings = sorted(self._readings[plan])
        if len(readings) >= _RARE:
            return readings[-1 - len(readings) // _RARE]
        limit = _OUTLIER * statistics.median(readings)
        return min(readings[-1 if readings[-1] <= limit else -2], limit)

    @property
    def timed(self) -> list[Plan]:
        """Plans with predictions that are known from measured times."""
        plans = (plan for plan in self._readings if not plan.exact and plan.fraction > 0.0)
        return [plan for plan in plans if self.seconds(plan) is not None]

    def relative(self, plan: Plan) -> float:
        """Cost of a plan in exact steps, measured if it was timed, else from a timed plan nearby, else from operation counts."""
        if plan.exact:
            return 1.0
        exact = self.seconds(EXACT)
        known = {other: self.seconds(other) or 0.0 for other in self.timed}
        if exact is None or not known:
            return self.expected(plan)
        if plan in known:
            return known[plan] / exact
        nearest = min(known, key=lambda other: (other.ridge != plan.ridge, abs(other.fraction - plan.fraction)))
        ridge = _RIDGE * (plan.ridge - nearest.ridge)
        slope = _SLOPE * (1.0 - self.fixed_share)
        return known[nearest] / exact + slope * (plan.fraction - nearest.fraction) + ridge

    def expected(self, plan: Plan) -> float:
        """Cost of a plan in exact steps as it looks before any was timed: from the rehearsal, or from operation counts without one."""
        fixed, fraction = self.fixed_share, plan.fraction
        control, rest = fixed + (1.0 - fixed) * fraction, fixed + (1.0 - fixed) * (1.0 - fraction)
        return control + rest * self.prediction + _RIDGE * plan.ridge

    @property
    def prediction(self) -> float:
        """Cost of predicting a whole micro-batch, in exact steps."""
        exact, rehearsed = self.seconds(EXACT), self.seconds(REHEARSED)
        return _PREDICTION if exact is None or rehearsed is None else rehearsed / exact

    @property
    def fixed_share(self) -> float:
        """Share of a pass's time that does not depend on the number of its examples; 0 before it was rehearsed."""
        whole, part = self.seconds(REHEARSED), self.seconds(REHEARSED_PART)
        if not whole or part is None:
            return 0.0
        # Seconds are those of one unit of work: of a part, there are fewer units.
        return min(1.0, max(0.0, (part / whole - 1.0) / (PART - 1.0)))

    def forget_dear(self) -> None:
        """Forget what plans with predictions took that were dearer than the rehearsal promised: the machine may have been busy."""
        exact = self.seconds(EXACT) or math.inf
        dear = {plan for plan in self.timed if (self.seconds(plan) or 0.0) / exact > self.expected(plan)}
        self._readings = {plan: kept for plan, kept in self._readings.items() if plan not in dear}

    def renew_exact(self) -> None:
        """Forget what exact steps took but for the last reading: the machine may have become slower or faster since."""
        if EXACT in self._readings:
            self._readings[EXACT] = deque(list(self._readings[EXACT])[-1:], maxlen=_KEPT_EXACT)

    def observing(self) -> float:
        """What learning from an exact step adds to it, in exact steps; 1 before it was timed."""
        exact, observed = self.seconds(EXACT), self.seconds(OBSERVED)
        return 1.0 if exact is None or observed is None else max(0.0, observed / exact - 1.0)

    def state_dict(self) -> list[list[float]]:
        """Readings, one row per plan: fraction, ridge, readings."""
        return [[plan.fraction, float(plan.ridge), *readings] for plan, readings in self._readings.items()]

    def load_state_dict(self, rows: Iterable[list[float]]) -> None:
        """Restore :meth:`state_dict`."""
        self._readings = {}
        for fraction, ridge, *readings in rows:
            for seconds in readings:
                self.record(Plan(fraction, bool(ridge)), seconds)


def _empty(plan: Plan) -> deque[float]:
    return deque(maxlen=_KEPT_EXACT if plan.exact else REHEARSALS if plan.fraction == 0.0 else _KEPT)
