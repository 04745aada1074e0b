"""The controller in a closed loop with machines whose times are made up: what it decides over thousands of micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hf_lgp.controller import Controller
from hf_lgp.costs import OBSERVED, PART, REHEARSALS, REHEARSED, REHEARSED_PART
from hf_lgp.plans import EXACT, Explained, Plan, price_of
from hf_lgp.settings import LGPSettings

EXAMPLES = 64

LEARNING = 5
"""Observed micro-batches until the predictor is ready."""


class Loop:
    """A controller on a machine.

    Args:
        seconds: Seconds of a micro-batch under a plan, by the number of micro-batches before it.
        rho2: Share of variance explained, by the same number.
    """

    def __init__(self, seconds: Callable[[Plan, int], float], rho2: Callable[[int], float]) -> None:
        self.controller = Controller(LGPSettings(variance_budget=1.25).resolved(on_path=False), on_path=False)
        self.seconds, self.rho2 = seconds, rho2
        self.observed = self.changes = 0
        self.plans: list[Plan] = []
        self.lost: list[float] = []
        self.saved = 0.0
        self._readings: list[tuple[Plan, float, float]] = []

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            self._step()
        return self

    def _step(self) -> None:
        controller, ready = self.controller, self.observed >= LEARNING
        seen = controller.seen
        if controller.rests(ready):
            self._note(EXACT, self.seconds(EXACT, seen), 0.0)
            controller.advance(ready)
            return
        if controller.review_due(ready):
            share = self.rho2(seen) if ready else 0.0
            self.changes += controller.review(self._readings, (Explained(), Explained(share, share)))
            self._readings = []
        label, plan, extra = controller.label(ready, EXAMPLES), controller.now(ready), 0.0
        if controller.rehearses(ready):
            for rehearsed, size in ((REHEARSED, 1.0), (REHEARSED_PART, 1.0 / PART)):
                rehearsal = [self.seconds(rehearsed, seen) for _ in range(REHEARSALS)]
                self._readings += [(rehearsed, size, seconds) for seconds in rehearsal]
                extra += sum(rehearsal) * size
        observes = plan.exact and controller.observes(ready)
        seconds = self.seconds(OBSERVED if observes else plan, seen)
        if label is not None:
            self._readings.append((label, 1.0, seconds))
        self.observed += not ready and observes
        self._note(plan, seconds + extra, self.rho2(seen))
        controller.advance(ready)

    def _note(self, plan: Plan, seconds: float, rho2: float) -> None:
        exact = self.seconds(EXACT, self.controller.seen)
        self.plans.append(plan)
        self.saved += exact - seconds
        self.lost.append((seconds / exact if plan.exact else price_of(plan, seconds / exact, rho2, EXAMPLES)) - 1.0)

    def predicted(self, start: int, stop: int | None = None) -> float:
        """Share of micro-batches with predictions."""
        plans = self.plans[start:stop]
        return sum(not plan.exact for plan in plans) / len(plans)


def machine(
    prediction: float, observing: float = 0.1, actual: float | None = None, fixed: float = 0.0
) -> Callable[[Plan, int], float]:
    """An exact micro-batch takes a second, ``prediction`` the prediction of one when rehearsed and ``actual`` in a plan.

    Of these, the share ``fixed`` does not depend on the number of examples.
    """

    def seconds(plan: Plan, seen: int) -> float:
        if plan.fraction == 0.0:  # in units of work, of which a part has fewer
            return prediction * (1.0 + fixed * (PART - 1.0) * (plan == REHEARSED_PART))
        if plan.exact:
            return 1.0 + observing * (plan == OBSERVED)
        control, rest = (fixed + (1.0 - fixed) * share for share in (plan.fraction, 1.0 - plan.fraction))
        return control + rest * (prediction if actual is None else actual)

    return seconds


def test_what_pays_is_followed_and_what_does_not_is_not() -> None:
    good, bad = Loop(machine(0.4), lambda _: 0.95).run(1000), Loop(machine(0.4), lambda _: 0.2).run(1000)
    assert good.predicted(20) > 0.95 and bad.predicted(0) == 0.0
    assert good.controller.saved == pytest.approx(good.saved, rel=0.05)


def test_passes_of_mostly_overhead_are_seen_through_before_anything_is_learnt() -> None:
    loop = Loop(machine(0.45, fixed=0.6), lambda _: 0.99).run(2000)
    assert loop.predicted(0) == 0.0 and loop.observed == 0
    assert Loop(machine(0.45, fixed=0.2), lambda _: 0.99).run(2000).predicted(50) > 0.95


@pytest.mark.parametrize(("accumulation", "extra"), [(4, 0.4), (4, 0.8), (8, 1.6)])
def test_what_the_end_of_an_optimizer_step_takes_makes_no_difference(accumulation: int, extra: float) -> None:
    plain = machine(0.5)

    def seconds(plan: Plan, seen: int) -> float:
        return plain(plan, seen) + extra * (seen % accumulation == accumulation - 1 and plan.fraction > 0.0)

    loop = Loop(seconds, lambda _: 0.95).run(4000)
    assert loop.predicted(50) > 0.9 and loop.changes <= 12
    assert loop.controller.saved == pytest.approx(loop.saved, rel=0.15)


@pytest.mark.parametrize("prediction", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("slower", [0.5, 1.4, 2.0, 4.0])
def test_a_machine_that_becomes_slower_or_faster_changes_little(prediction: float, slower: float) -> None:
    plain = machine(prediction)
    loop = Loop(lambda plan, seen: plain(plan, seen) * (slower if seen >= 777 else 1.0), lambda _: 0.97).run(3000)
    assert loop.predicted(100, 777) > 0.95
    assert loop.predicted(777, 1277) > 0.85 and loop.predicted(1277) > 0.95


@pytest.mark.parametrize("busy", [0.8, 0.9, 1.0, 1.5])
def test_a_rehearsal_on_a_busy_machine_is_not_believed_for_ever(busy: float) -> None:
    plain, idle = machine(busy), machine(0.4)
    loop = Loop(lambda plan, seen: (plain if seen <= 8 else idle)(plan, seen), lambda _: 0.95).run(8000)
    assert loop.predicted(6000) > 0.95


def test_what_was_given_up_because_predictions_were_poor_comes_back_with_them() -> None:
    loop = Loop(machine(0.85, actual=0.4), lambda seen: 0.99 if seen < 1000 else 0.3 if seen < 2000 else 0.93)
    loop.run(4000)
    assert loop.predicted(100, 1000) > 0.9 and loop.predicted(1100, 2000) == 0.0 and loop.predicted(3000) > 0.9


@pytest.mark.parametrize("steps", [500, 1000, 2000, 16000])
@pytest.mark.parametrize("actual", [0.8, 0.9, 1.0, 1.1, 2.0])
def test_trials_that_never_pay_are_hardly_felt(steps: int, actual: float) -> None:
    """The rehearsal promises what no plan then keeps."""
    loop = Loop(machine(0.3, actual=actual), lambda _: 0.92).run(steps)
    assert loop.predicted(0) > 0.0
    assert sum(loop.lost) < 0.01 * steps + 5.0


@pytest.mark.parametrize("cost", [0.45, 0.55, 0.62, 0.7, 0.8])
def test_noise_costs_little_whatever_the_price(cost: float) -> None:
    """Times of a shared machine: a fifth up and down, and a hiccup of ten micro-batches' length now and then."""
    plain, lost = machine(cost), []
    for seed in range(8):
        random_numbers = random.Random(seed)

        def seconds(plan: Plan, seen: int, random_numbers: random.Random = random_numbers) -> float:
            return plain(plan, seen) * random_numbers.uniform(0.8, 1.2) + 10.0 * (random_numbers.random() < 0.01)

        lost += [
            (plain(plan, 0) if plan.exact else price_of(plan, plain(plan, 0), 0.93, EXAMPLES)) - 1.0
            for plan in Loop(seconds, lambda _: 0.93).run(4000).plans
        ]
    best = min(0.0, *(price_of(p, plain(p, 0), 0.93, EXAMPLES) - 1.0 for p in (Plan(0.25), Plan(0.5))))
    assert sum(lost) / len(lost) < best + 0.04
