"""The controller: which plan now, when to observe, when to refit, when to move the bases.

Within a period it decides from counts alone, so it never waits for the device and every process of a distributed run takes the
same branch. With an automatic control fraction it reviews its plan every few dozen micro-batches while it predicts, and after every look while it
does not, from figures that all processes share. At a fixed fraction only the regression's use is reviewed, where there is a path besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .costs import OBSERVED, Costs
from .old_estimator import control_size
from .lookout import REHEARSAL, TRIAL_STEPS, Lookout
from .plans import EXACT, FRACTIONS, Explained, Plan, choose, choose_ridge, price_of, variance_of
from .settings import LGPSettings

_EAGER_BASIS_STEPS = 8
"""The first bases are random: they move at every one of the first so many micro-batches observed, until they point somewhere."""

_MEASURING_STEPS = 4
"""Predictions are compared with exact gradients at every so many micro-batches: coefficients change slowly."""

_REVIEW_STEPS = 32
"""Micro-batches between two choices of a plan: whole cycles of refits and basis moves at the default settings."""

_CLEAN_STEPS = 101
"""Micro-batches between two that are exact and not observed while a plan predicts, to time them; prime to what recurs otherwise."""

_EARLY_CLEAN_STEPS = (11, 19, 35, 67)
"""Micro-batches after the predictor was ready that are clean as well: the first times are the least certain."""

_SETTLING_STEPS = 2
"""Micro-batches after a change of plan that are not timed: they allocate what later ones reuse."""

_AWAKE = 4
"""Exact micro-batches before a look or a rehearsal that are timed; others pass by without as much as a glance."""


class Controller:
    """Decisions of one training run.

    Args:
        settings: The method's settings; ``control_fraction`` 0 chooses automatically.
        on_path: Whether the class path is followed: then plans without the regression are possible.
        fractions: Control fractions to choose from.

    Attributes:
        seen: Micro-batches so far.
        plan: The plan followed once the predictor is ready.
        costs: Measured times.
        rho2: Shares of variance explained without and with the regression, as of the last review.
        saved: Estimated seconds saved so far against exact training, negative for a loss.
        insists: Whether to try predictions however dear they look, as a probe does.
    """

    def __init__(self, settings: LGPSettings, on_path: bool, fractions: Sequence[float] = FRACTIONS) -> None:
        self.settings, self.fractions = settings, fractions
        self.seen = 0
        self.costs = Costs()
        self.rho2 = {False: Explained(), True: Explained()}
        self.saved = 0.0
        self._unaccounted: list[tuple[Plan, float, float]] = []
        self._since_fit = 0
        self._observed = 0
        self._due: list[int] = []
        self._settling = 0
        self._lookout = Lookout()
        self.insists = False
        self._last = self._usual = 0
        self.follow(on_path)
        self._schedule()

    def follow(self, on_path: bool) -> None:
        """Start over with or without the class path."""
        self.on_path = on_path
        self.plan = EXACT if self.automatic else Plan(self.settings.control_fraction, ridge=True)

    @property
    def automatic(self) -> bool:
        """Whether the plan is chosen by price."""
        return self.settings.automatic

    @property
    def chooses(self) -> bool:
        """Whether there is more than one plan to choose from."""
        return self.automatic or self.on_path

    def now(self, ready: bool) -> Plan:
        """The plan of the next micro-batch: exact until the predictor is ready, and now and then to time exact steps."""
        if not ready:
            return EXACT
        clean = self.seen % _CLEAN_STEPS == 0 or self.seen - self._lookout.ready_at in _EARLY_CLEAN_STEPS
        return EXACT if self.automatic and clean and self._lookout.ready_at >= 0 else self.plan

    def observes(self, ready: bool) -> bool:
        """Whether the predictor takes examples from this micro-batch."""
        if not ready:
            return not self.automatic or (self.seen > REHEARSAL and not self._lookout.hopeless)
        if self.automatic and self.now(ready).exact:
            return self.plan.exact and self._looks
        return self.measures(ready) or self.seen % self.settings.observe_steps == 0

    def rehearses(self, ready: bool) -> bool:
        """Whether to time the prediction of this micro-batch, for no other use."""
        if not self.automatic or self.insists:
            return False
        lookout = self._lookout
        if not ready:
            return self.seen == REHEARSAL or (lookout.hopeless and lookout.until_rehearsal(self.seen) == 0)
        return self.plan.exact and self._looks and lookout.doubts_rehearsal(self.seen)

    def rests(self, ready: bool) -> bool:
        """Whether this micro-batch is exact and there is nothing to do about it, not even to time it."""
        if not self.automatic or self.review_due(ready):
            return False
        lookout = self._lookout
        if not ready:
            return self.seen > REHEARSAL and lookout.hopeless and lookout.until_rehearsal(self.seen) > _AWAKE
        until_review = min((at - self.seen for at in self._due if at >= self.seen), default=math.inf)
        timed_soon = lookout.until_look(self.seen) <= _AWAKE or until_review <= _SETTLING_STEPS + _AWAKE
        return self.plan.exact and not timed_soon

    @property
    def _looks(self) -> bool:
        return self._lookout.until_look(self.seen) == 0

    def _schedule(self) -> None:
        allowed = [plan for plan in self._candidates() if self.variance(plan) <= self.budget]
        self._lookout.schedule(self.costs, self._candidates(), allowed, self._price, self.insists)

    def moves_bases(self, ready: bool, fitted: bool = True) -> bool:
        """Whether this micro-batch, if it is observed, contributes to the bases.

        Args:
            ready: Whether the predictor is ready.
            fitted: Whether the regression was fitted: then predictions can be compared with whole gradients, which is due.
        """
        if self.seen < _EAGER_BASIS_STEPS or self.seen % self.settings.basis_steps == 0:
            return True
        if not self.automatic:
            return False
        early = not ready and (fitted or self._observed < _EAGER_BASIS_STEPS)
        return early or (ready and self.plan.exact)

    def measures(self, ready: bool) -> bool:
        """Whether to compare predictions with the exact gradients of this micro-batch, if it is observed."""
        steps = max(_MEASURING_STEPS, self.settings.observe_steps)
        return not ready or self.moves_bases(ready) or self.seen % steps == 0

    def refit_due(self, remembered: int, fitted: bool, queue_full: bool) -> bool:
        """Whether to refit after this micro-batch.

        Args:
            remembered: Exact examples at hand.
            fitted: Whether there is a fit already.
            queue_full: Whether the queue has no room for another micro-batch.
        """
        if not fitted:
            return remembered >= self.settings.warmup_examples
        return queue_full or self._since_fit >= self.settings.refit_steps

    def label(self, ready: bool, examples: int) -> Plan | None:
        """What the time of this micro-batch is a reading of; None if it is not to be timed.

        Args:
            ready: Whether the predictor is ready.
            examples: Size of the micro-batch: one that is smaller than that before it tells little.
        """
        smaller, self._last = examples < self._last, examples
        if not smaller:
            self._usual = examples
        if self._settling > 0 or smaller or not self.automatic or self.seen == 0 or self.rehearses(ready):
            return None
        plan = self.now(ready)
        return OBSERVED if plan.exact and self.observes(ready) else plan

    def advance(self, ready: bool) -> None:
        """Count one micro-batch.

        Args:
            ready: Whether the predictor was ready for it.
        """
        looked = self.automatic and ready and self.plan.exact and self.observes(ready)
        rehearsed = self.rehearses(ready)
        if rehearsed:
            self._lookout.rehearsed(self.seen)
        if looked and self._lookout.retries(self.seen):
            self.costs.forget_dear()  # they get another trial
        self._observed += not ready and self.observes(ready)
        if ready and self._lookout.ready_at < 0:
            self._lookout.ready_at = self._lookout.looked_at = self.seen
        if looked:
            self._lookout.looked_at = self.seen
        self.seen += 1
        if looked or rehearsed:
            self.review_in(0)
        self._since_fit += 1
        self._settling = max(0, self._settling - 1)

    def refitted(self) -> None:
        """Note that the regression was just fitted."""
        self._since_fit = 0

    # -- the choice of a plan ----------------------------------------------------------------------------------------------

    def review_due(self, ready: bool) -> bool:
        """Whether to :meth:`review` before the next micro-batch: there is news, or predictions have gone on for a while."""
        if not self.chooses:
            return False
        predicting = ready and not self.plan.exact and (self.seen - self._lookout.ready_at) % _REVIEW_STEPS == 0
        return predicting or self.review_presses(ready)

    def review_presses(self, ready: bool) -> bool:
        """Whether the review now due is worth waiting for the device: it comes rarely, and much hangs on it."""
        return (ready and self._lookout.ready_at < 0) or self.seen in self._due

    def review_in(self, steps: int) -> None:
        """Have a review in so many micro-batches."""
        self._due = [at for at in self._due if at >= self.seen] + [self.seen + steps]

    def review(self, readings: Sequence[tuple[Plan, float, float]], rho2: tuple[Explained, Explained]) -> bool:
        """Choose a plan.

        Args:
            readings: Plan, size and seconds per unit of the micro-batches timed since the last review.
            rho2: Shares of variance explained without and with the regression.

        Returns:
            Whether the plan changed.
        """
        self.rho2 = dict(zip((False, True), rho2, strict=True))
        if not self.automatic:
            before, self.plan = self.plan, choose_ridge(self.plan, self.rho2, self._usual)
            return self.plan != before
        for plan, _, seconds in readings:
            self.costs.record(plan, seconds)
        self._unaccounted += [reading for reading in readings if reading[0] != EXACT]
        if (exact := self.costs.seconds(EXACT)) is not None:
            instead = (
                (size, self.costs.own(plan, seconds), 0.0 if plan.fraction == 0.0 else exact)
                for plan, size, seconds in self._unaccounted
            )
            self.saved += sum(size * (spared - seconds) for size, seconds, spared in instead)
            self._unaccounted.clear()
        self._schedule()
        chosen = self.best()
        changed = chosen != self.plan
        if changed:
            self.plan, self._settling = chosen, _SETTLING_STEPS
            self._lookout.changed(self.seen, given_up=chosen.exact)
            if chosen.exact:  # the exact steps that it was compared with may be long past: once more, with fresh ones
                self.costs.renew_exact()
                self.review_in(_SETTLING_STEPS + _AWAKE)
            elif chosen not in self.costs.timed:
                for steps in TRIAL_STEPS:
                    self.review_in(steps)
        return changed

    def _candidates(self) -> list[Plan]:
        """Plans to choose from besides exact training."""
        # With a single control example nothing could be measured any more.
        fractions = [f for f in self.fractions if not self._usual or control_size(self._usual, f) >= 2]
        return [Plan(f, ridge) for f in fractions for ridge in ((False, True) if self.on_path else (True,))]

    def best(self, budget: float | None = None) -> Plan:
        """The plan to follow by the figures of the last review: the present one unless another is clearly better.

        Args:
            budget: Largest variance of its gradient over that of the exact one; None for that of the settings.
        """
        candidates = self._candidates()
        costs = {plan: self.costs.relative(plan) for plan in candidates}
        return choose(self.plan, candidates, costs, self.rho2, self.budget if budget is None else budget, self._usual)

    @property
    def budget(self) -> float:
        """Largest variance of a plan's gradient over that of the exact one; infinite without a limit."""
        return self.settings.variance_budget or math.inf

    @property
    def price(self) -> float:
        """Price of the present plan by the figures of the last review; plain training has price 1."""
        return self._price(self.plan, self.costs.relative(self.plan))

    def _price(self, plan: Plan, cost: float) -> float:
        return price_of(plan, cost, self.rho2[plan.ridge].share, self._usual)

    def variance(self, plan: Plan) -> float:
        """Variance of a plan's gradient over that of the exact one, by the figures of the last review."""
        return variance_of(plan, self.rho2[plan.ridge].share, self._usual)

    @property
    def explained(self) -> Explained:
        """Shares of variance that the present plan explains; while it is exact, those of the cheapest kind of prediction."""
        return self.rho2[self.plan.ridge or not self.on_path]

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and figures by name, as JSON knows them."""
        return {
            "seen": self.seen,
            "since_fit": self._since_fit,
            "due": self._due,
            "observed": self._observed,
            "lookout": self._lookout.state_dict(),
            "plan": [self.plan.fraction, self.plan.ridge],
            "rho2": [[self.rho2[ridge].overall, self.rho2[ridge].worst] for ridge in (False, True)],
            "saved": self.saved,
            "settling": self._settling,
            "sizes": [self._last, self._usual],
            "costs": self.costs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a plan that was chosen by price gives way to a fixed one."""
        self.seen, self._since_fit = state["seen"], state["since_fit"]
        self._due, self._observed = list(state["due"]), state["observed"]
        self._lookout.load_state_dict(state["lookout"])
        fraction, ridge = state["plan"]
        self.plan = Plan(float(fraction) if self.automatic else self.plan.fraction, bool(ridge) or not self.on_path)
        if self.plan.exact:
            self.plan = EXACT
        self.rho2 = {ridge: Explained(*shares) for ridge, shares in zip((False, True), state["rho2"], strict=True)}
        self.saved, self._settling = state["saved"], state["settling"]
        self._last, self._usual = state["sizes"]
        self.costs.load_state_dict(state["costs"])
        self._schedule()
