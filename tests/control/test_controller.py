"""The controller in simulated runs: it finds what pays, keeps to the budget, and loses little where nothing does."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count

import pytest

from hf_lgp.control.controller import PERIOD, Controller, Rules
from hf_lgp.control.plan import StepPlan
from hf_lgp.control.residual import Residual

M = 64
RULES = Rules(fraction=0.0, budget=1.1, exact_steps=20, first_row=False)


def compute_bound(plan: StepPlan) -> float:
    """A model whose time is arithmetic: the last block on one row saves a sixth, a prediction costs 0.4."""
    exact = 0.85 if plan.first_row else 1.0
    return exact * (plan.fraction + (1.0 - plan.fraction) * 0.4) + 0.04 * plan.measure


def overhead_bound(plan: StepPlan) -> float:
    """A model whose time is the number of operations."""
    return 1.0 + 1.7 * (plan.fraction < 1.0) + 1.8 * plan.measure


def simulate(
    steps: int,
    time_of: Callable[[StepPlan], float],
    share: Callable[[int], float],
    rules: Rules = RULES,
    noise: float = 0.1,
    smaller: float = 1.0,
    late: int = 0,
) -> tuple[Controller, list[StepPlan], float]:
    """A run: the controller at its end, the plans it made, and its time in plain steps; readings come so many periods late, as on a GPU."""
    draw, controller, rules = random.Random(0), Controller(size=M), replace(rules, steps=steps)
    plans: list[StepPlan] = []
    pending: list[list[tuple[StepPlan, int, float]]] = [[] for _ in range(late + 1)]
    spent = 0.0
    for step in range(steps):
        if controller.seen % PERIOD == 0 and not controller.rests(rules):
            for plan, at, unit in pending.pop(0):
                controller = controller.timed(plan, unit, at).accounted(plan, unit, 1.0)
                if plan.measure:
                    residual = share(at) * smaller**plan.rows * math.exp(draw.gauss(0, 0.3))
                    controller = controller.measured(
                        [residual, 0.5 * residual], [1.0, 0.5], plan.measure, at, plan.rows
                    )
            pending.append([])
            controller = controller.decided(rules, step)
        plan = StepPlan() if (rests := controller.rests(rules)) else controller.plan(rules, step)
        unit = time_of(plan) * math.exp(draw.gauss(0, noise))
        plans.append(plan)
        pending[-1] += [] if rests else [(plan, controller.seen, unit)]
        controller, spent = controller.advanced(plan), spent + time_of(plan)
    return controller, plans, spent / steps


def test_it_predicts_where_that_pays_and_spends_little_on_finding_out() -> None:
    controller, plans, time = simulate(1000, compute_bound, lambda at: 0.02)
    assert controller.fraction == 0.25, "an eighth would have 1.14 of the variance"
    assert time < 0.02 + compute_bound(StepPlan(0.25)) + 0.03 * 0.5
    assert not any(plan.fraction < 1.0 for plan in plans[: RULES.exact_steps])
    assert controller.saved == pytest.approx(1000 * (1 - time), rel=0.15)


@pytest.mark.parametrize("late", [0, 2])
def test_good_predictions_begin_as_soon_as_readings_arrive(late: int) -> None:
    rules = replace(RULES, exact_steps=0, first_row=True)
    _, plans, time = simulate(200, compute_bound, lambda at: 0.015, rules, late=late)
    assert [plan.fraction < 1.0 for plan in plans[: 9 + 8 * late]].index(True) == 8 + 8 * late
    assert 8 <= sum(plan.measure > 0 for plan in plans) <= 15 + 2 * late, "they are measured often at first"
    assert time < compute_bound(StepPlan(0.25, first_row=True)) + (8 * (1 + late) * 0.6 + 15 * 0.3) / 200


@pytest.mark.parametrize("first_row", [False, True])
def test_what_one_measurement_leaves_open_is_measured_more(first_row: bool) -> None:
    rules = replace(RULES, exact_steps=0, first_row=first_row)
    plans = simulate(200, compute_bound, lambda at: 0.05, rules, 0.02)[1]
    assert [p.fraction < 1.0 for p in plans].index(True) == 24
    assert sum(p.measure > 2 for p in plans[:24]) == 9


def test_a_machine_that_slows_down_is_no_reason_to_give_up() -> None:
    """Exact steps were timed when it was fast; what they take now is found out before predictions end."""
    calls = count()

    def slowing(plan: StepPlan) -> float:
        return compute_bound(plan) * (1.0 if next(calls) < 300 else 2.0)

    controller, plans, _ = simulate(600, slowing, lambda at: 0.02)
    assert controller.fraction < 1.0
    assert sum(plan.fraction < 1.0 for plan in plans[100:]) > 430


def test_a_machine_that_slows_down_is_no_reason_to_give_up_the_last_block_on_one_row() -> None:
    calls = count()

    def slowing(plan: StepPlan) -> float:
        return compute_bound(plan) * (1.0 if next(calls) < 600 else 2.0)

    controller, plans, _ = simulate(1200, slowing, lambda at: 0.02, replace(RULES, first_row=True))
    assert controller.fraction < 1.0 and controller.times.first_row
    assert sum(plan.fraction < 1.0 for plan in plans[600:]) > 540


def test_predictions_come_back_when_the_machine_has_recovered() -> None:
    """Dear for a while, they are given up; a look times them anew instead of trusting old times."""
    calls = count()

    def contended(plan: StepPlan) -> float:
        busy = 200 <= next(calls) < 500 and plan.fraction < 1.0
        return 3.0 if busy else compute_bound(plan)

    plans = simulate(6000, contended, lambda at: 0.02)[1]
    assert all(plan.fraction == 1.0 for plan in plans[400:4000] if not plan.measure)
    assert sum(plan.fraction < 1.0 for plan in plans[5000:]) > 900


def test_looks_try_few_rows_again() -> None:
    """Many rows explained enough and were too dear; later few rows explain enough."""
    rules = replace(RULES, doublings=2)
    plans = simulate(4000, with_more_rows(0.5), lambda at: 0.15 if at < 500 else 0.01, rules, smaller=0.4)[1]
    assert not any(plan.fraction < 1.0 for plan in plans[:500])
    assert all(
        plan.fraction < 1.0 and plan.rows == 0 for plan in plans[-60:-1] if plan != StepPlan() and not plan.measure
    )
    assert sum(plan.fraction < 1.0 for plan in plans) > 500


def test_a_run_that_goes_on_trusts_little_of_what_was_timed() -> None:
    before = simulate(1000, compute_bound, lambda at: 0.02)[0]
    after = before.resumed()
    assert after.fraction == before.fraction and after.comparing and after.size == 0
    assert {len(times) for times in after.times.latest.values()} == {1}
    waiting = simulate(1000, overhead_bound, lambda at: 0.02)[0]
    assert waiting.look_at > waiting.seen + 2 * PERIOD and not waiting.resumed().rests(RULES)


def test_predictions_that_are_not_finite_explain_nothing() -> None:
    controller = Controller().measured([math.nan, 0.1], [1.0, 1.0], 8, 7)
    assert controller.measurements == 1 and controller.residual_share == pytest.approx(0.55)
    assert Controller().measured([0.1], [math.inf], 8, 7).measurements == 0


def test_measurements_of_other_tensors_begin_anew() -> None:
    known = Residual((0.1,) * 3, (1.0,) * 3, 8, 10)
    assert known.measured([0.1], [1.0], 20).count == 1 and known.measured([0.1] * 3, [1.0] * 3, 20).count == 9


def test_a_better_prediction_allows_a_smaller_fraction() -> None:
    assert simulate(1000, compute_bound, lambda at: 0.005)[0].fraction == 0.0625
    assert simulate(1000, compute_bound, lambda at: 0.02, replace(RULES, budget=math.inf))[0].fraction == 0.125


def test_the_fewer_measurements_the_further_within_the_budget() -> None:
    controller = Controller(residuals=(Residual((0.012,), (1.0,), 1),))
    assert controller.allows(RULES, 0.25, 0) and not controller.allows(RULES, 0.125, 0)
    often = Controller(residuals=(Residual((0.012,), (1.0,), 8),))
    assert often.allows(RULES, 0.125, 0)


def with_more_rows(dearer: float) -> Callable[[StepPlan], float]:
    """Every doubling of the rows that are followed makes a step with a walk dearer."""
    walks = lambda plan: plan.fraction < 1.0 or plan.measure > 0  # noqa: E731
    return lambda plan: compute_bound(plan) + dearer * (2**plan.rows - 1) * walks(plan)


@pytest.mark.parametrize(
    ("share", "smaller", "dearer", "rows", "fraction"),
    [
        (0.01, 0.3, 0.04, 0, 0.125),  # good enough
        (0.15, 0.4, 0.04, 2, 0.25),  # 0.06 with twice as many, 0.024 with four times
        (0.15, 0.9, 0.04, 0, 1.0),  # the first doubling is of no use
        (0.05, 0.4, 0.50, 0, 0.5),  # of use, but too dear
    ],
)
def test_more_rows_are_followed_where_their_price_is_less(
    share: float, smaller: float, dearer: float, rows: int, fraction: float
) -> None:
    rules = replace(RULES, doublings=2)
    controller, plans, _ = simulate(1500, with_more_rows(dearer), lambda at: share, rules, 0.02, smaller)
    assert controller.fraction == fraction and (controller.rows == rows or fraction == 1.0)
    assert sum(plan.rows > 1 and plan.measure > 0 and plan.fraction == 1.0 for plan in plans) <= 8


@pytest.mark.parametrize("late", [0, 2])
def test_no_more_is_measured_because_readings_come_late(late: int) -> None:
    rules = replace(RULES, doublings=2)
    _, plans, _ = simulate(600, with_more_rows(0.04), lambda at: 0.8, rules, 0.02, 0.5, late)
    for rows, most in ((0, 8), (1, 4), (2, 4)):
        assert (
            0 < sum(p.measure == 8 and p.rows == rows and p.fraction == 1.0 for p in plans[: 100 + 10 * late]) <= most
        )


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("bad", [0.3, 0.9])
def test_a_look_finds_predictions_that_have_become_good(late: int, bad: float) -> None:
    rules = replace(RULES, doublings=2)
    share = lambda at: 0.01 if at < 300 or at > 1500 else bad  # noqa: E731
    controller, plans, _ = simulate(4000, with_more_rows(0.04), share, rules, 0.02, 0.9, late)
    assert not any(plan.fraction < 1.0 for plan in plans[1100:1400]) and controller.fraction < 1.0


def test_where_nothing_helps_looks_are_cheap_with_more_rows_too() -> None:
    rules = replace(RULES, doublings=2)
    assert simulate(2000, with_more_rows(0.04), lambda at: 0.9, rules, 0.1, 0.7)[2] < 1.03


@pytest.mark.parametrize("steps", [60, 126, 500, 3000])
def test_a_run_whose_measurements_are_dear_and_bad_makes_few(steps: int) -> None:
    """A large model and few tokens: gradients by group cost more than the steps."""
    rules = replace(RULES, exact_steps=0, first_row=True, doublings=2)
    _, plans, time = simulate(steps, lambda p: compute_bound(p) + 3.5 * (p.measure > 2), lambda at: 0.45, rules, 0.05)
    assert not any(plan.fraction < 1.0 for plan in plans)
    assert time < 0.85 + (3.5 + 8 * 0.15) / steps + 0.04


def test_where_nothing_pays_plain_steps_rest_but_for_those_before_a_look() -> None:
    controller = simulate(400, overhead_bound, lambda at: 0.01)[0]
    assert controller.rests(RULES) and controller.look_at > 4000
    assert not replace(controller, seen=controller.look_at - 2 * PERIOD).rests(RULES)
    assert not controller.rests(replace(RULES, fraction=0.5))
    one_row = controller.times.timed(StepPlan(first_row=True), 0.1)
    assert not replace(controller, times=one_row).rests(RULES), "plain steps are to be timed beside these"
    assert not simulate(400, compute_bound, lambda at: 0.01)[0].rests(RULES)


@pytest.mark.parametrize("late", [0, 2])
def test_a_machine_that_was_hopeless_may_become_good(late: int) -> None:
    calls = count()

    def quieter(plan: StepPlan) -> float:
        return overhead_bound(plan) if next(calls) < 4000 else compute_bound(plan)

    assert simulate(8400, quieter, lambda at: 0.01, late=late)[0].fraction < 1.0


def test_one_long_rehearsal_does_not_end_all_hope() -> None:
    def first_is_long(plan: StepPlan) -> float:
        return 9.0 if plan.measure == 2 and next(calls) == 0 else compute_bound(plan)

    calls = count()
    assert simulate(60, first_is_long, lambda at: 0.01)[0].fraction < 1.0


@pytest.mark.parametrize(("exact_steps", "late"), [(32, 0), (32, 2), (100, 2)])
def test_a_run_that_is_to_begin_exactly_is_rehearsed_once_and_in_time(exact_steps: int, late: int) -> None:
    rules = replace(RULES, exact_steps=exact_steps, first_row=True)
    plans = simulate(200, compute_bound, lambda at: 0.01, rules, 0.02, late=late)[1]
    assert sum(plan.measure == 2 for plan in plans) == 1
    assert exact_steps <= [plan.fraction < 1.0 for plan in plans].index(True) <= exact_steps + 8


def test_an_early_start_does_not_forgo_more_rows() -> None:
    rules = replace(RULES, exact_steps=0, budget=math.inf, first_row=True, doublings=2)
    controller, plans, _ = simulate(300, with_more_rows(0.02), lambda at: 0.06, rules, 0.02, 0.2)
    assert controller.rows == 1 and [plan.fraction < 1.0 for plan in plans].index(True) <= 24


def test_a_run_that_goes_on_with_other_settings_follows_as_many_rows_as_they_say() -> None:
    controller = simulate(1500, with_more_rows(0.04), lambda at: 0.15, replace(RULES, doublings=2), 0.02, 0.4)[0]
    assert controller.rows > 0
    for rules in (RULES, replace(RULES, fraction=0.5, doublings=2)):
        assert controller.decided(rules, 1500).rows == 0


def test_as_many_rows_are_followed_as_was_said() -> None:
    assert not any(plan.rows for plan in simulate(800, with_more_rows(0.04), lambda at: 0.2, RULES, 0.1, 0.3)[1])


def test_the_last_block_on_one_row_is_used_where_it_is_faster() -> None:
    _, plans, time = simulate(400, compute_bound, lambda at: 0.9, replace(RULES, first_row=True))
    assert sum(plan.first_row for plan in plans) > 350 and time < 0.88
    slower = simulate(400, lambda p: 1.0 + 0.1 * p.first_row, lambda at: 0.9, replace(RULES, first_row=True))
    assert sum(plan.first_row for plan in slower[1]) < 20 and slower[2] < 1.03


@pytest.mark.parametrize(("time_of", "share"), [(compute_bound, 0.9), (overhead_bound, 0.9), (overhead_bound, 0.01)])
def test_where_nothing_pays_little_is_lost(time_of: Callable[[StepPlan], float], share: float) -> None:
    controller, plans, time = simulate(2000, time_of, lambda at: share)
    assert controller.fraction == 1.0 and time < 1.03
    assert sum(plan.fraction < 1.0 for plan in plans) < 60


def test_predictions_that_become_bad_are_given_up_and_good_ones_are_found_later() -> None:
    assert simulate(3000, compute_bound, lambda at: 0.02 if at < 1000 else 0.9)[0].fraction == 1.0
    assert simulate(3500, compute_bound, lambda at: 0.9 if at < 1000 else 0.02)[0].fraction < 1.0


def test_a_noisy_machine_does_not_end_predictions() -> None:
    _, plans, time = simulate(1500, compute_bound, lambda at: 0.02, noise=0.4)
    assert sum(plan.fraction < 1.0 for plan in plans) > 1200 and time < 0.65


def test_a_fixed_fraction_is_followed_from_the_first_step_and_measured_now_and_then() -> None:
    _, plans, _ = simulate(200, compute_bound, lambda at: 0.5, replace(RULES, fraction=0.5, exact_steps=0))
    assert {plan.fraction for plan in plans} == {0.5} and 2 <= sum(plan.measure > 0 for plan in plans) <= 4


def test_measuring_steps_run_the_last_block_as_those_with_predictions_do() -> None:
    """Or some would compare the gradients of other blocks than others."""
    controller, plans, _ = simulate(
        60,
        lambda plan: 1.2 if plan == StepPlan(first_row=True) else compute_bound(plan),
        lambda at: 0.05,
        replace(RULES, first_row=True),
    )
    assert not controller.times.first_row
    measuring = [plan for plan in plans if plan.measure]
    assert len(measuring) > 2 and all(plan.first_row for plan in measuring)


def test_a_fixed_fraction_begins_after_the_exact_steps_that_were_asked_for() -> None:
    _, plans, _ = simulate(20, compute_bound, lambda at: 0.5, replace(RULES, fraction=0.5, exact_steps=7))
    assert [plan.fraction for plan in plans] == [1.0] * 7 + [0.5] * 13


@pytest.mark.parametrize(("size", "measures"), [(1, False), (2, False), (4, True)])
def test_of_batches_with_one_control_example_nothing_is_measured(size: int, measures: bool) -> None:
    plan = Controller(seen=32).sized(size).plan(replace(RULES, fraction=0.5), 50)
    assert plan.fraction == 0.5 and (plan.measure > 0) == measures


@pytest.mark.parametrize("other", [False, True])
def test_readings_of_a_comparison_that_come_after_it_start_no_other(other: bool) -> None:
    """On a GPU they are late; one that is fast by chance says nothing new."""
    paths = {0.25: 0.5, 0.125: 0.3 if other else 0.9, 0.0625: 0.9}
    controller = Controller(seen=64, size=M, fraction=0.25, comparing=True, rehearsed_at=6, asked_at=8)
    controller = controller.measured([0.01], [1.0], 8, 60)
    for at in range(20, 28):
        for plan, unit in ((StepPlan(), 1.0), *((StepPlan(f), unit) for f, unit in paths.items())):
            controller = controller.timed(plan, unit, at)
    after = replace(controller, comparing=True).decided(replace(RULES, exact_steps=0, budget=math.inf), 64)
    assert not after.comparing and after.fraction == (0.125 if other else 0.25)
    assert not after.timed(StepPlan(), 0.1, 60).comparing and after.timed(StepPlan(), 0.1, 70).comparing


def test_exact_steps_that_were_timed_on_a_busy_machine_are_found_to_be_fast() -> None:
    """Predictions paid at first, and no longer once the machine is quiet."""
    calls = count()

    def busy_at_first(plan: StepPlan) -> float:
        busy = next(calls) < 48
        return 1.2 if plan.fraction < 1.0 else (2.0 if busy else 1.0) + 0.04 * plan.measure

    rules = replace(RULES, exact_steps=0)
    controller, plans, _ = simulate(600, busy_at_first, lambda at: 0.01, rules, 0.02)
    assert controller.fraction == 1.0 and 20 < sum(plan.fraction < 1.0 for plan in plans) < 150


def test_half_a_share_is_that_of_the_whole_and_half_the_mean_over_tensors() -> None:
    controller = Controller().measured([0.1, 0.1], [1.0, 0.2], 8, 0)
    assert controller.residual_share == pytest.approx(0.5 * (0.2 / 1.2 + (0.1 + 0.5) / 2))


def test_sums_are_averaged_before_they_are_divided_and_old_ones_fade() -> None:
    controller = Controller().measured([1.0], [1.0], 8, 0)
    for k in range(200):
        controller = controller.measured([0.1], [1.0], 8, 32 * (k + 1))
    assert controller.residual_share == pytest.approx(0.1, rel=1e-3)
    assert Controller().measured([0.0], [1.0], 8, 0).measured([3.0], [3.0], 8, 0).residual_share == 0.75


def test_measurements_that_are_not_finite_are_left_out() -> None:
    assert Controller().measured([0.1], [math.nan], 8, 0).measurements == 0
    assert Controller().measured([0.1], [1.0], 2, 0).measurements == 0, "two groups tell nothing"
    assert Controller().measured([0.0], [0.0], 8, 0).measurements == 0, "nor does a batch of one example"


def test_the_record_survives_json_in_mid_run() -> None:
    controller, _, _ = simulate(300, compute_bound, lambda at: 0.02)
    assert Controller.from_state_dict(json.loads(json.dumps(asdict(controller)))) == controller
    with pytest.raises((KeyError, TypeError)):
        Controller.from_state_dict({"seen": 3, "lookout": {}})
