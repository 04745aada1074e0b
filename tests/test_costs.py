"""Costs: what is measured counts, what is not is put together from it."""

from __future__ import annotations

import pytest

from hf_lgp.costs import OBSERVED, REHEARSED, REHEARSED_PART, Costs
from hf_lgp.plans import EXACT, Plan


def costs(**readings: tuple[Plan, list[float]]) -> Costs:
    table = Costs()
    for plan, seconds in readings.values():
        for reading in seconds:
            table.record(plan, reading)
    return table


def test_unknown_costs_come_from_operation_counts() -> None:
    table = Costs()
    assert table.relative(EXACT) == 1.0
    assert table.relative(Plan(0.25)) == pytest.approx(0.25 + 0.75 * 0.4)
    assert table.relative(Plan(0.25)) < table.relative(Plan(0.25, ridge=True)) < table.relative(Plan(0.5))
    assert table.seconds(EXACT) is None and table.observing() == 1.0


def test_a_timed_plan_has_its_own_cost_and_tells_those_of_others() -> None:
    plan = Plan(0.25, ridge=True)
    table = costs(exact=(EXACT, [2.0] * 3), plan=(plan, [1.0] * 16))
    assert table.relative(plan) == pytest.approx(0.5)
    assert table.relative(Plan(0.125, ridge=True)) < 0.5 < table.relative(Plan(0.5, ridge=True)) < 1.0
    assert table.relative(Plan(0.25)) < 0.5


@pytest.mark.parametrize("fixed", [0.0, 0.3, 1.0])
def test_a_rehearsal_of_a_part_tells_what_does_not_depend_on_the_number_of_examples(fixed: float) -> None:
    # A whole micro-batch of 8 units takes 4 s, a quarter of it 4 s times what is fixed and a quarter of the rest.
    part = 4.0 * (fixed + (1.0 - fixed) / 4.0)
    table = costs(
        exact=(EXACT, [1.0] * 3), whole=(REHEARSED, [9.0, 4.0 / 8.0]), part=(REHEARSED_PART, [9.0, part / 2.0])
    )
    assert table.fixed_share == pytest.approx(fixed) and table.prediction == pytest.approx(0.5) and table.timed == []
    control, rest = (fixed + (1.0 - fixed) * share for share in (0.25, 0.75))
    assert table.relative(Plan(0.25)) == pytest.approx(control + 0.5 * rest)
    assert table.relative(Plan(0.5)) - table.relative(Plan(0.25)) == pytest.approx(0.25 * (1.0 - fixed) * 0.5)


def test_few_readings_of_a_plan_tell_nothing_yet() -> None:
    table = costs(exact=(EXACT, [2.0]), plan=(Plan(0.25), [9.0] * 3))
    assert table.relative(Plan(0.25)) == Costs().relative(Plan(0.25))


def test_few_readings_are_enough_where_all_are_dear() -> None:
    plan = Plan(0.25)
    assert costs(exact=(EXACT, [2.0]), plan=(plan, [3.0] * 4)).relative(plan) == pytest.approx(1.5)
    assert costs(exact=(EXACT, [2.0]), plan=(plan, [3.0] * 3 + [1.9])).timed == []


def test_a_rehearsal_tells_what_predictions_cost_until_a_plan_was_timed() -> None:
    rehearsed = (EXACT, [2.0] * 3), (REHEARSED, [9.0, 1.0, 1.1])
    table = costs(exact=rehearsed[0], rehearsed=rehearsed[1])
    assert table.relative(Plan(0.25)) == pytest.approx(0.25 + 0.75 * 0.5) and table.timed == []
    for _ in range(16):
        table.record(Plan(0.25), 1.5)
    assert table.relative(Plan(0.25)) == pytest.approx(0.75)
    table.forget_dear()
    assert table.relative(Plan(0.25)) == pytest.approx(0.625) and table.seconds(EXACT) == 2.0
    for _ in range(16):
        table.record(Plan(0.25), 1.2)
    table.forget_dear()
    assert table.relative(Plan(0.25)) == pytest.approx(0.6), "what was cheaper than promised is known"


def test_rare_dear_steps_count_and_interruptions_do_not() -> None:
    plan = Plan(0.25)
    assert costs(plan=(plan, [1.0] * 15 + [3.0])).seconds(plan) == pytest.approx(18 / 16)
    assert costs(plan=(plan, [1.0] * 15 + [1000.0])).seconds(plan) == 1.0
    assert costs(plan=(plan, [1.0] * 14 + [1000.0] * 2)).seconds(plan) == pytest.approx(24 / 16)
    assert costs(plan=(plan, [1.0] * 45 + [3.0] * 3)).seconds(plan) == 1.0 + 2.0 * 3 / 48
    assert costs(exact=(EXACT, [1.0] * 3 + [1000.0])).seconds(EXACT) == 1.0


def test_what_a_plan_itself_does_rarely_counts_whole_however_dear() -> None:
    plan = Plan(0.25)
    assert costs(plan=(plan, ([1.0] * 15 + [9.0]) * 3)).seconds(plan) == pytest.approx(1.5)


def test_exact_steps_and_predictions_are_measured_alike() -> None:
    """Every fourth micro-batch ends an optimizer step, and is dearer by one."""
    plan = Plan(0.25)
    table = costs(exact=(EXACT, [1.0, 1.0, 1.0, 2.0] * 4), plan=(plan, [0.5, 0.5, 0.5, 1.5] * 12))
    assert table.relative(plan) == pytest.approx(3.0 / 5.0)


def test_interruptions_are_no_part_of_a_reading() -> None:
    plan = Plan(0.25)
    table = costs(plan=(plan, [1.0] * 31))
    assert table.own(plan, 2.0) == 1.0 and table.own(Plan(0.5), 2.0) == 2.0
    assert table.own(plan, 0.5) == 0.5


def test_exact_steps_can_be_timed_anew() -> None:
    table = costs(exact=(EXACT, [1.0] * 16))
    table.renew_exact()
    table.record(EXACT, 3.0)
    assert table.seconds(EXACT) == 2.0


def test_old_readings_are_forgotten() -> None:
    table = costs(exact=(EXACT, [9.0] * 50 + [1.0] * 48))
    assert table.seconds(EXACT) == 1.0


def test_what_learning_adds() -> None:
    assert costs(exact=(EXACT, [2.0]), observed=(OBSERVED, [3.0])).observing() == pytest.approx(0.5)
    assert costs(exact=(EXACT, [2.0]), observed=(OBSERVED, [1.9])).observing() == 0.0


def test_state_is_restored() -> None:
    table, restored = costs(exact=(EXACT, [2.0]), plan=(Plan(0.25, True), [1.0] * 60)), Costs()
    restored.load_state_dict(table.state_dict())
    assert restored.state_dict() == table.state_dict()
    assert restored.relative(Plan(0.25, True)) == table.relative(Plan(0.25, True)) == 0.5
