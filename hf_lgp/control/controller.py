"""When to predict, and with which control fraction: functions on one immutable record of what was measured.

An automatic run goes through three stages. *Exact*: its first eight micro-batches, or more, in which plain steps are timed against those whose last block is run on the first
row only, and the residual's share of the variance is measured, once if that promises much. *Trial*: a fraction whose expected price is below that of exact steps is followed for a few
micro-batches, so that its time is known; the share is measured more often. *Predicting*: it is followed as long as its measured price is the best; now and then a
micro-batch measures the share, and a plain one is timed. Before it is given up because it no longer pays, and as soon as one
exact step takes less time than it is worth, exact steps are timed anew in turns with it. Where nothing pays, steps are exact, and looks become rarer and rarer.
Where the share is too large for small fractions, it is measured with twice as many rows followed, and twice as many again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ..estimator import FRACTIONS, control_size, price, relative_variance
from ..state_files import frozen
from .plan import GROUPS, StepPlan
from .residual import Residual
from .step_times import REHEARSAL, StepTimes

# In micro-batches, where nothing else is said.
PERIOD = 8  # between two decisions
MEASURE_EVERY = 32  # between two measurements while gradients are predicted
CLEAN_EVERY = 101  # between two exact ones while others are not, plain and cheaper in turns, to time them; prime to what recurs otherwise
_MEASUREMENTS, _MORE = 8, 4  # measurements before a choice that one does not make clear, and with twice as many rows
_OFTEN = 4  # between two measurements while gradients are predicted and so many are not yet made
_SMALL_SHARE = 0.03  # of the residual, below which more rows are not tried
_HELPS = 0.8  # the share with twice as many rows over that without, above which they are of no use
_TRIAL = 6  # times of a kind of step before they are believed
_SETTLING = 2  # after a change of plan, not timed: they allocate what later ones reuse
_MARGIN = 0.95  # expected price, relative to exact steps, below which an untried fraction is tried
_HYSTERESIS = 0.97  # price, relative to the present one, below which another fraction takes over
_WRONG = 3.0  # the factor by which a first measurement may be wrong
_SPENT = 0.02  # share of a run that is spent on finding out more
# Until the first look after nothing paid, and at most, each look that finds nothing doubling them; and where even perfect predictions would save
# too little, which only the machine can change. Then measurements of a look.
_FIRST_LOOK, _LAST_LOOK, _HOPELESS_LOOK, _LOOKS = 64, 1024, 4096, 2


@dataclass(frozen=True)
class Rules:
    """What a run was asked for."""

    fraction: float  # fixed control fraction; 0 to choose
    budget: float  # largest relative variance that a choice may cause
    exact_steps: int  # optimizer steps at the start that are exact
    first_row: bool  # whether some stack's last block can be run on the first row only
    steps: int = 0  # micro-batches of the whole run
    doublings: int = 0  # how often the number of rows that are followed may be doubled


@dataclass(frozen=True)
class Controller:
    """What was measured so far and what follows from it."""

    seen: int = 0  # micro-batches so far
    fraction: float = 1.0  # the fraction followed; 1 for exact steps
    times: StepTimes = field(default_factory=StepTimes)
    rows: int = 0  # how often the number of rows that are followed is doubled
    residuals: tuple[Residual, ...] = (Residual(),)  # what was measured with each number of rows
    changed_at: int = 0  # micro-batch of the last change of fraction
    look_at: int = 0  # micro-batch from which on to look again, while nothing pays
    rehearsed_at: int = 0  # micro-batch of the latest rehearsal
    asked_at: int = 0  # micro-batch from which on measurements were wanted
    look_after: int = _FIRST_LOOK  # what the next look that finds nothing will wait
    saved: float = 0.0  # estimated seconds saved against plain steps
    size: int = 0  # examples of the largest micro-batch so far, on average over processes
    compared_at: int = 0  # micro-batch of the last comparison's end
    comparing: bool = False  # whether exact steps are timed anew beside predicted ones, before these are given up

    @property
    def residual_share(self) -> float:
        """``sigma_e^2 / sigma^2`` with the present number of rows."""
        return self.residuals[self.rows].share

    @property
    def measurements(self) -> int:
        """How often that was measured."""
        return self.residuals[self.rows].count

    def variance(self, fraction: float) -> float:
        """Relative variance of the gradient at a fraction."""
        return relative_variance(fraction, self.residual_share)

    def allows(self, rules: Rules, fraction: float, rows: int) -> bool:
        """Whether the budget allows a fraction. Few measurements may have missed the examples that are predicted worst: the residual of one counts twice."""
        share, count = self.residuals[rows].share, self.residuals[rows].count
        return relative_variance(fraction, share * (1.0 + 1.0 / max(1, count))) <= rules.budget

    def plan(self, rules: Rules, step: int, accumulation: int = 1) -> StepPlan:
        """The plan of the next micro-batch, without the seed of its draw: the same in every process, whatever its examples."""
        fraction = rules.fraction or self.fraction
        groups = GROUPS if control_size(self.size, fraction) >= 2 else 0
        if rules.fraction and step < rules.exact_steps:
            return StepPlan()
        if rules.fraction:
            due = self.seen % (4 * MEASURE_EVERY) == MEASURE_EVERY and fraction < 1.0  # nothing is decided by it
            return StepPlan(fraction, groups * due, rules.first_row)
        if self.seen % CLEAN_EVERY == CLEAN_EVERY - 1:
            return StepPlan(first_row=rules.first_row and self.seen // CLEAN_EVERY % 2 == 1)
        if step < rules.exact_steps or self.fraction >= 1.0:
            return self._exact_step(rules, (rules.exact_steps - step) * accumulation, groups)
        if self.comparing and self._odd:
            return self.times.exact_plan
        few = self.measurements < _MEASUREMENTS and not self._dear(_MEASUREMENTS, rules.steps)
        due = self.seen - self.changed_at >= _SETTLING and self.seen % (_OFTEN if few else MEASURE_EVERY) == 0
        return StepPlan(fraction, groups * due, rules.first_row, rows=self.rows)

    def rests(self, rules: Rules) -> bool:
        """Whether steps are plain ones that need not even be timed: nothing pays, and the next look is far."""
        waits = not rules.fraction and self.fraction >= 1.0 and self.seen + 2 * PERIOD < self.look_at
        return waits and not self.times.first_row

    def _exact_step(self, rules: Rules, left: int, groups: int) -> StepPlan:
        """An exact step, of which ``left`` are left at the start of the run: one that times or measures something, if that is due."""
        exact = self.times.exact_plan
        comparing = rules.first_row and self.seen < 2 * PERIOD  # in turns, to compare their times
        ordinary = StepPlan(first_row=self._odd) if comparing else exact
        if not groups or left > _MEASUREMENTS + 2 * PERIOD or self.seen < self.look_at:
            return ordinary
        left_before_decision = PERIOD - self.seen % PERIOD
        rehearsal = replace(REHEARSAL, first_row=rules.first_row)
        if not self._rehearsed:
            since = self.seen - self.rehearsed_at if self.rehearsed_at else math.inf
            if since == 1 and not self.measurements:  # to see what that costs and whether it promises something
                return replace(rehearsal, measure=groups)
            # Readings may come late.
            return rehearsal if left_before_decision == 2 and since >= 3 * PERIOD else ordinary
        if comparing or self._hopeless:
            return ordinary
        # Readings may come late: only if they did not after a while, more is measured.
        due = self._unknown(rules) and (self.seen - self.asked_at) % (4 * PERIOD) < self._wanted(rules)
        return StepPlan(measure=groups, first_row=rules.first_row, rows=self.rows) if due else exact

    @property
    def _odd(self) -> bool:
        """Every other micro-batch, but in step with nothing that recurs, such as the exchange of gradients between processes."""
        return self.seen.bit_count() % 2 == 1

    def _wanted(self, rules: Rules) -> int:
        """Measurements wanted before a choice; more of a look, where few of them leave open what the budget allows."""
        share = self.residual_share
        open_still = any(
            relative_variance(f, share) <= rules.budget and not self.allows(rules, f, self.rows) for f in FRACTIONS
        )
        return (_MORE if open_still else _LOOKS) if self.look_at else _MORE if self.rows else _MEASUREMENTS

    def _unknown(self, rules: Rules) -> bool:
        """Whether too little was measured with the present number of rows, since the look began if there is one."""
        known = self.residuals[self.rows]
        if known.at < self.look_at or not known.count:
            return True
        # One is enough where even a share far below would allow no fraction, or one far above would let predictions pay.
        hopes = relative_variance(max(FRACTIONS), known.share / _WRONG) <= rules.budget
        return known.count < self._wanted(rules) and hopes and not self._promises(rules, _WRONG * known.share)

    def _promises(self, rules: Rules, share: float) -> bool:
        """Whether predictions would pay with such a share."""
        allowed = (f for f in FRACTIONS if relative_variance(f, share) <= rules.budget)
        return any(price(f, share, self.times.cost(f, self.rows)) < _MARGIN for f in allowed)

    def _dear(self, measurements: int, steps: int) -> bool:
        """Whether so many measurements would take too much of what the run has taken, or of its steps in all."""
        own = self.times.as_exact(StepPlan(measure=GROUPS))
        return measurements * max(0.0, (own or 0.0) - 1.0) > _SPENT * max(self.seen, steps)

    @property
    def _hopeless(self) -> bool:
        """Whether even perfect predictions would save too little."""
        return min(self.times.cost(fraction, 0) for fraction in FRACTIONS) > _MARGIN

    @property
    def _rehearsed(self) -> bool:
        """Whether a rehearsal was timed, or two if the first leaves no hope: first times are long."""
        return self.times.count(REHEARSAL) >= (2 if self._hopeless else 1)

    def advanced(self, plan: StepPlan) -> Controller:
        """One micro-batch later."""
        rehearsed_at = self.seen if plan.measure == REHEARSAL.measure else self.rehearsed_at
        return replace(self, seen=self.seen + 1, rehearsed_at=rehearsed_at)

    def sized(self, examples: float) -> Controller:
        """With the size of one more micro-batch."""
        return replace(self, size=max(self.size, round(examples)))

    def rested(self, micro_batches: int) -> Controller:
        """So many plain micro-batches later, or earlier, that are not timed."""
        return replace(self, seen=self.seen + micro_batches)

    def timed(self, plan: StepPlan, unit: float, at: int) -> Controller:
        """With the time per unit of work that micro-batch number ``at`` took; those that tell little are left out."""
        if not math.isfinite(unit) or (plan.fraction < 1.0 and at - self.changed_at < _SETTLING) or at == 0:
            return self
        later = replace(self, times=self.times.timed(plan, unit))
        present = later.times.seconds(self._present)
        if self.comparing or at < self.compared_at or present is None:
            return later
        if plan.fraction < 1.0 or plan.measure or self.fraction >= 1.0 or unit > self.variance(self.fraction) * present:
            return later
        return later._anew()  # the machine may have been slow when exact steps were timed

    def measured(
        self, residual: Sequence[float], total: Sequence[float], groups: int, at: int, rows: int = 0
    ) -> Controller:
        """With one more measurement, by tensor, of so many groups and rows, made at micro-batch ``at``; that of too few groups tells nothing.

        A prediction that is not finite explains nothing.
        """
        if groups < GROUPS or rows >= len(self.residuals) or not 0.0 < sum(total) < math.inf:
            return self
        residual = [r if math.isfinite(r) else t for r, t in zip(residual, total, strict=True)]
        known = list(self.residuals)
        # A look begins anew: what was measured before would outweigh it.
        before = Residual() if known[rows].at < self.look_at <= at else known[rows]
        known[rows] = before.measured(residual, total, at)
        return replace(self, residuals=tuple(known))

    def decided(self, rules: Rules, step: int) -> Controller:
        """With a fraction chosen by what is known now."""
        if self.rows > (0 if rules.fraction else rules.doublings):  # a run that goes on with other settings
            return replace(self, rows=0, residuals=self.residuals[:1]).decided(rules, step)
        if self._rehearsed and not self.asked_at and self.seen >= 2 * PERIOD:
            return replace(self, asked_at=self.seen).decided(rules, step)
        if rules.fraction or step < rules.exact_steps or not (self.times.count(StepPlan()) and self.size):
            return self
        judged = (self._present, *[self.times.exact_plan] * self.comparing)
        if self.fraction >= 1.0:
            if not self._rehearsed or self.seen < self.look_at:
                return self
            more_rows = self._more_rows_may_help(rules)
            if self.seen < 2 * PERIOD and (more_rows or not self._promises(rules, _WRONG * self.residual_share)):
                return self  # nothing is given up for what few times say
            if not self._hopeless:
                if self._unknown(rules):
                    return self
                if more_rows:
                    more = (*self.residuals, Residual())
                    return replace(self, rows=self.rows + 1, residuals=more, asked_at=self.seen)
        elif any(self.times.count(plan) < _TRIAL for plan in judged):
            return self
        fresh = (rows for rows, known in enumerate(self.residuals) if known.at >= self.look_at)
        every = tuple(fresh) if self.fraction >= 1.0 else (self.rows,)
        untried = 1.0 / _MARGIN if self.fraction >= 1.0 else 1.0  # from one fraction to another little can go wrong
        prices = {(1.0, self.rows): 1.0}
        for k, f in product(every, FRACTIONS):
            if self.allows(rules, f, k) and control_size(self.size, f) >= 2:
                doubt = 1.0 if self.times.count(StepPlan(f, rows=k)) else untried
                prices[f, k] = doubt * price(f, self.residuals[k].share, self.times.cost(f, k))
        best, rows = min(prices, key=prices.__getitem__)  # of equals the first
        present = prices.get((self.fraction, self.rows), math.inf)
        if 1.0 > best != self.fraction and prices[best, rows] > _HYSTERESIS * present:
            best, rows = self.fraction, self.rows
        if best >= 1.0 > self.fraction and present < math.inf and not self.comparing:
            return self._anew()  # the machine may have slowed down since exact steps were timed
        if best >= 1.0:
            return self._waiting(given_up=self.fraction < 1.0)
        if best == self.fraction:
            return replace(self, comparing=False, compared_at=self.seen) if self.comparing else self
        later = replace(self, fraction=best, rows=rows, look_at=0, comparing=False)
        return replace(later, changed_at=self.seen, compared_at=self.seen)

    @property
    def _present(self) -> StepPlan:
        """The kind of step that is followed."""
        return StepPlan(self.fraction, rows=self.rows)

    def _anew(self) -> Controller:
        """Exact steps are timed in turns with those that are followed."""
        kinds = StepPlan(), StepPlan(first_row=True), self._present
        return replace(self, comparing=True, times=self.times.last_only(*kinds))

    def _more_rows_may_help(self, rules: Rules) -> bool:
        """Whether twice as many rows are worth a measurement: they are not known, and the latest doubling was of use."""
        shares = [known.share for known in self.residuals]
        if self.rows >= rules.doublings or self.rows + 1 < len(shares) or shares[-1] < _SMALL_SHARE:
            return False
        return (len(shares) == 1 or shares[-1] < _HELPS * shares[-2]) and not self._dear(_MORE, rules.steps)

    def _waiting(self, given_up: bool) -> Controller:
        """Exact from here on, until a look, each with another number of rows; times of predictions are forgotten once the wait is long: the machine may have been busy."""
        # What paid for long may do so again soon.
        after = _FIRST_LOOK if given_up and self.seen - self.changed_at >= self.look_after else self.look_after
        wait = _HOPELESS_LOOK if self._hopeless else after
        while wait < _HOPELESS_LOOK and replace(self, seen=wait)._dear(_LOOKS, 0):
            wait *= 2
        # Looks end where decisions are made.
        look_at = (self.seen + wait) // PERIOD * PERIOD + PERIOD - _LOOKS
        old = self._hopeless or (not given_up and after >= 8 * _FIRST_LOOK)
        return replace(
            self,
            fraction=1.0,
            rows=self.rows if given_up else (self.rows + 1) % len(self.residuals),
            comparing=False,
            changed_at=self.seen if given_up else self.changed_at,
            look_at=look_at,
            asked_at=look_at,
            look_after=min(_LAST_LOOK, 2 * after),
            times=self.times.without(*["0."] * old, *["2 groups"] * self._hopeless),
        )

    def resumed(self) -> Controller:
        """At the start of a run that goes on: the machine may be another, and so may be the size of micro-batches."""
        look_at = min(self.look_at, (self.seen // PERIOD + 2) * PERIOD - _LOOKS)
        return replace(
            self,
            times=self.times.last_only(),
            comparing=self.fraction < 1.0,
            look_at=look_at,
            asked_at=look_at or self.asked_at,
            size=0,
        )

    def accounted(self, plan: StepPlan, unit: float, size: float) -> Controller:
        """With what a micro-batch saved against a plain one."""
        plain = self.times.seconds(StepPlan())
        if plain is None or plan == StepPlan() or not math.isfinite(unit):
            return self
        return replace(self, saved=self.saved + (plain - unit) * size)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Controller:
        """The record whose fields these are, nested as JSON knows them.

        Raises:
            KeyError, TypeError: If the state is another version's.
        """
        state = frozen(state)
        times, residuals = StepTimes(**state["times"]), tuple(Residual(**each) for each in state["residuals"])
        return cls(**{**state, "times": times, "residuals": residuals})
