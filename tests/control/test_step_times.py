"""What steps cost: medians of the latest times, and estimates between what was timed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_lgp.control.plan import StepPlan
from hf_lgp.control.step_times import REHEARSAL, StepTimes

PLAIN, ONE_ROW = StepPlan(), StepPlan(first_row=True)


def times_of(*timed: tuple[StepPlan, float]) -> StepTimes:
    times = StepTimes()
    for plan, unit in timed:
        times = times.timed(plan, unit)
    return times


def test_the_median_of_the_latest_counts() -> None:
    times = times_of((PLAIN, 9.0), *[(PLAIN, unit) for unit in (1.0, 2.0, 3.0) * 5])
    assert times.seconds(PLAIN) == 2.0 and times.count(PLAIN) == 15
    assert times.seconds(ONE_ROW) is None and times.count(ONE_ROW) == 0


@pytest.mark.parametrize(("unit", "faster"), [(0.8, True), (0.98, False), (1.1, False)])
def test_exact_steps_are_of_the_faster_kind(unit: float, faster: bool) -> None:
    times = times_of((PLAIN, 1.0), (ONE_ROW, unit))
    assert times.exact_plan == StepPlan(first_row=faster)
    assert not times_of((PLAIN, 1.0)).first_row


def test_what_is_done_besides_is_compared_with_the_faster_exact_steps() -> None:
    times = times_of((PLAIN, 1.0), (ONE_ROW, 1.25), (replace(REHEARSAL, first_row=True), 2.5))
    assert not times.first_row and times.as_exact(REHEARSAL) == 2.5 and times.count(REHEARSAL) == 1
    assert times.timed(REHEARSAL, 3.0).timed(REHEARSAL, 2.4).as_exact(REHEARSAL) == 2.4
    assert times.as_exact(StepPlan(measure=8)) is None


def test_before_any_prediction_was_timed_the_rehearsal_tells_whether_operations_or_their_number_are_dear() -> None:
    times = times_of((PLAIN, 1.0))
    assert times.cost(0.25, 0) == pytest.approx(0.25 + 0.75 * 0.4)
    assert times.timed(REHEARSAL, 1.3).cost(0.25, 0) == times.cost(0.25, 0)
    assert times.timed(REHEARSAL, 5.0).cost(0.25, 0) > 2.5
    assert StepTimes().cost(0.25, 0) == 1.0


def test_an_untimed_fraction_lies_on_the_line_through_the_nearest_and_exact_steps() -> None:
    times = times_of((PLAIN, 2.0), (StepPlan(0.25, first_row=True), 1.2), (StepPlan(0.5, first_row=True), 1.6))
    assert times.cost(0.25, 0) == pytest.approx(0.6)
    kappa = (0.6 - 0.25) / 0.75
    assert times.cost(0.125, 0) == pytest.approx(0.125 + 0.875 * kappa)


def test_what_more_rows_cost_is_seen_in_measurements() -> None:
    times = times_of((PLAIN, 1.0), (StepPlan(0.25, first_row=True), 0.6))
    times = times.timed(StepPlan(measure=8), 1.5).timed(StepPlan(measure=8, rows=1), 1.7)
    kappa = (0.6 - 0.25) / 0.75 + 0.2
    assert times.cost(0.25, 1) == pytest.approx(0.25 + 0.75 * kappa)


def test_times_are_forgotten_by_kind() -> None:
    predicted = StepPlan(0.25, first_row=True)
    times = times_of(*[(PLAIN, 1.0)] * 3, *[(predicted, 0.6)] * 3)
    assert times.last_only(PLAIN).count(PLAIN) == 1 and times.last_only(PLAIN).count(predicted) == 3
    assert times.without("0.").count(predicted) == 0 and times.without("0.").count(PLAIN) == 3
    rehearsed = times.timed(REHEARSAL, 1.0)
    assert rehearsed.without("2 groups") == times
