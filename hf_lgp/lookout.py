"""The lookout: while every step is exact, when to look how well gradients would be predicted, when to rehearse, and when to try again.

A look observes one exact micro-batch, so that the share of explained variance stays known; a rehearsal times predictions that are thrown away;
a trial follows a plan for a few micro-batches. Each costs something and can only tell that nothing has changed, so they become rarer and rarer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .costs import REHEARSALS, REHEARSED, Costs
from .plans import EXACT, HYSTERESIS, Plan

REHEARSAL = 4
"""The micro-batch whose prediction is timed and thrown away, when some exact ones were timed: where that alone costs too much, nothing
need be observed. Where it does, it is repeated after 64, 512, 4096, ... micro-batches: the machine may have been busy."""

TRIAL_STEPS = (7, 14)
"""Micro-batches after which a plan that was never timed is reviewed: it may turn out dear, sooner if very much so."""

_LOOK_MULTIPLE = 32
"""Looks are a multiple of so many micro-batches apart, and one: over the micro-batches of an optimizer step, of which the last is the
dearest, they take turns."""

_FIRST_LOOK = 16
"""Micro-batches after the predictor was ready that an exact one is observed, and then after twice, four times, ... as many: predictions
may become good soon."""

_WORTH_LEARNING = 0.9
"""Cost of a step, relative to an exact one, that perfect predictions have to keep to: to learn them costs time as well, and none is perfect."""

_EARLY_TRIALS = 2
"""So many trials may fail before they become rare: the machine may have been busy."""

_ESTABLISHED = 64
"""A plan that was followed for so many micro-batches has proved itself. That it is given up may be the machine's doing: looks begin anew,
and as many trials may fail as at first."""

_LOOKING_SHARE = 0.004
"""Share of the time that goes into looks, and what follows from them, in a long run."""

_HOPELESS_SHARE = 0.0004
"""The same where even perfect predictions would save too little: only the machine can change that."""


class Lookout:
    """The schedule of looks, rehearsals and trials of one training run.

    Attributes:
        hopeless: Whether even perfect predictions would save too little time.
        ready_at: Number of the micro-batch at which the predictor was ready; negative before.
        looked_at: That of the last look or change of plan.
    """

    def __init__(self) -> None:
        self.hopeless = False
        self.ready_at = self.looked_at = -1
        self._interval = 1
        self._since = -1
        self._rests_on_rehearsal = False
        self._failures, self._failed_at, self._rehearsed_at = 0, -1, -1

    def until_look(self, seen: int) -> int:
        """Exact micro-batches until one is observed: more and more, in the end as many as the cost demands.

        Args:
            seen: Micro-batches so far.
        """
        if self.ready_at < 0:
            return _FIRST_LOOK
        so_far = max(_FIRST_LOOK, self.looked_at - max(self.ready_at, self._since))
        doubtful = self._since >= 0 and self._failures < _EARLY_TRIALS
        steps = self._interval if self.hopeless and not doubtful else min(so_far, self._interval)
        return max(0, self.looked_at + steps - seen)

    def until_rehearsal(self, seen: int) -> int:
        """Micro-batches until predictions are rehearsed again before any was learnt.

        Args:
            seen: Micro-batches so far.
        """
        at = 16 * REHEARSAL
        while at < seen:
            at *= 8
        return at - seen

    def doubts_rehearsal(self, seen: int) -> bool:
        """Whether all that speaks against predictions is how dear they were when last rehearsed, and that is long past.

        Args:
            seen: Micro-batches so far.
        """
        return self._rests_on_rehearsal and seen - self._rehearsed_at >= self._interval

    def retries(self, seen: int) -> bool:
        """Whether a look now may be followed by another trial of what turned out dear.

        Args:
            seen: Micro-batches so far.
        """
        return self._failures < _EARLY_TRIALS or seen - self._failed_at >= self._interval

    def changed(self, seen: int, given_up: bool) -> None:
        """Note a change of plan.

        Args:
            seen: Micro-batches so far.
            given_up: Whether predictions were given up.
        """
        if given_up and seen - self.looked_at >= _ESTABLISHED:
            self._since, self._failures = seen, 0
        elif given_up:
            self._failures, self._failed_at = self._failures + 1, seen
        self.looked_at = seen

    def rehearsed(self, seen: int) -> None:
        """Note a rehearsal.

        Args:
            seen: Micro-batches so far.
        """
        self._rehearsed_at = seen

    def schedule(
        self,
        costs: Costs,
        candidates: Sequence[Plan],
        allowed: Sequence[Plan],
        price: Callable[[Plan, float], float],
        insists: bool,
    ) -> None:
        """Decide from what was timed how often to look.

        Args:
            costs: What was timed.
            candidates: Plans to choose from.
            allowed: Those of them that keep to the variance budget now.
            price: Price of a plan at a cost.
            insists: Whether nothing is hopeless.
        """
        known = bool(costs.timed) or costs.seconds(REHEARSED) is not None
        known = known and costs.seconds(EXACT) is not None and not insists
        # Not enough even if everything were explained.
        least = min(map(costs.relative, candidates), default=math.inf)
        # What predicts already need not pay for learning.
        self.hopeless = known and least > (HYSTERESIS if costs.timed else _WORTH_LEARNING)
        # A look may be followed by another trial of what did not pay, if it should by the rehearsal.
        timed = (plan for plan in costs.timed if plan in allowed)
        retried = (plan for plan in timed if price(plan, costs.expected(plan)) < HYSTERESIS)
        lost = max((price(plan, costs.relative(plan)) - 1.0 for plan in retried), default=0.0)
        steps, share = TRIAL_STEPS[-1], _LOOKING_SHARE
        if self.hopeless:
            lost, steps, share = max(least - 1.0, 0.1), TRIAL_STEPS[0], _HOPELESS_SHARE
        spent = costs.observing() + steps * min(max(lost, 0.0), 10.0)
        if not costs.timed:  # or by another rehearsal
            spent += REHEARSALS * min(costs.prediction, 10.0)
        by_counts = (price(plan, Costs().expected(plan)) for plan in allowed)
        self._rests_on_rehearsal = not costs.timed and min(by_counts, default=math.inf) < HYSTERESIS
        self._interval = 1 + _LOOK_MULTIPLE * max(1, math.ceil(spent / share / _LOOK_MULTIPLE))

    def state_dict(self) -> list[int]:
        """Counters."""
        return [self.ready_at, self.looked_at, self._failures, self._failed_at, self._rehearsed_at, self._since]

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Restore :meth:`state_dict`; what follows from times is decided anew by :meth:`schedule`."""
        self.ready_at, self.looked_at, self._failures, self._failed_at, self._rehearsed_at, self._since = state
