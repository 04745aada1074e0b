"""The controller: counts decide within a period, prices between two."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_lgp.controller import Controller
from hf_lgp.costs import OBSERVED, REHEARSED
from hf_lgp.plans import EXACT, Explained, Plan
from hf_lgp.settings import LGPSettings


def controller(on_path: bool = True, **values: Any) -> Controller:
    settings = LGPSettings(**{"control_fraction": 0.5, "window": 64, "warmup_examples": 32, **values})
    return Controller(settings.resolved(on_path), on_path)


def advance(decisions: Controller, steps: int, ready: bool = True) -> None:
    for _ in range(steps):
        decisions.advance(ready)


def explained(path: float, both: float) -> tuple[Explained, Explained]:
    """The same everywhere in the model."""
    return Explained(path, path), Explained(both, both)


def until_review(decisions: Controller) -> None:
    """Warm up: the first choice is due as soon as the predictor is ready."""
    advance(decisions, 10, ready=False)
    assert decisions.review_due(ready=True)


def readings(*times: tuple[Plan, float]) -> list[tuple[Plan, float, float]]:
    """Enough readings of each plan, of micro-batches of ten units."""
    return [(plan, 10.0, seconds) for plan, seconds in times for _ in range(16)]


# -- a fixed fraction --------------------------------------------------------------------------------------------------


def test_steps_are_exact_until_ready() -> None:
    assert controller().now(ready=False) == EXACT
    assert controller().now(ready=True) == Plan(0.5, ridge=True)


@pytest.mark.parametrize("basis_steps", [1, 5, 32])
@pytest.mark.parametrize("ready", [True, False])
def test_bases_move_eagerly_and_then_at_intervals(basis_steps: int, ready: bool) -> None:
    decisions = controller(basis_steps=basis_steps)
    moved = []
    for step in range(100):
        if decisions.moves_bases(ready):
            moved.append(step)
        decisions.advance(ready)
    assert moved == sorted({*range(8), *range(0, 100, basis_steps)})
    assert decisions.seen == 100


def test_the_first_fit_waits_for_the_warmup() -> None:
    decisions = controller(refit_steps=3)
    advance(decisions, 10)
    assert not decisions.refit_due(remembered=31, fitted=False, queue_full=True)
    assert decisions.refit_due(remembered=32, fitted=False, queue_full=False)


def test_refits_come_every_few_steps() -> None:
    decisions = controller(refit_steps=3)
    due = []
    for step in range(1, 10):
        decisions.advance(ready=True)
        if decisions.refit_due(remembered=64, fitted=True, queue_full=False):
            decisions.refitted()
            due.append(step)
    assert due == [3, 6, 9]


def test_a_full_queue_brings_the_refit_forward() -> None:
    decisions = controller(refit_steps=3)
    assert decisions.refit_due(remembered=64, fitted=True, queue_full=True)
    assert not decisions.refit_due(remembered=64, fitted=True, queue_full=False)


@pytest.mark.parametrize("observe_steps", [3, 8])
def test_examples_are_taken_at_some_micro_batches_once_predictions_are_made(observe_steps: int) -> None:
    decisions = controller(observe_steps=observe_steps, basis_steps=20)
    taken, measured = [], []
    for step in range(60):
        assert decisions.observes(ready=False) and decisions.measures(ready=False)
        if decisions.observes(ready=True):
            taken.append(step)
        if decisions.measures(ready=True):
            measured.append(step)
        decisions.advance(ready=True)
    assert set(measured) <= set(taken), "what is measured has to be observed"
    assert measured == sorted({*range(8), *range(0, 60, max(4, observe_steps)), *range(0, 60, 20)})
    assert taken == sorted({*measured, *range(0, 60, observe_steps)})


@pytest.mark.parametrize("on_path", [True, False])
def test_a_fixed_fraction_is_not_timed_and_reviewed_only_beside_a_path(on_path: bool) -> None:
    decisions = controller(on_path)
    reviewed = []
    for step in range(100):
        assert decisions.label(True, 8) is None
        assert decisions.now(True) == Plan(0.5, ridge=True)
        if decisions.review_due(True):
            reviewed.append(step)
        decisions.advance(True)
    assert reviewed == ([0, 32, 64, 96] if on_path else [])


def test_at_a_fixed_fraction_the_regression_is_used_where_it_explains_enough_more() -> None:
    decisions = controller()
    until_review(decisions)
    plans = []
    for path, both in ((0.0, 0.0), (0.9, 0.901), (0.0, 0.0), (0.9, 0.95), (0.95, 0.9), (0.0, 0.7)):
        decisions.review([], explained(path, both))
        plans.append(decisions.plan)
    used = [True, False, False, True, False, True]
    assert plans == [Plan(0.5, ridge) for ridge in used], "nothing measured changes nothing"
    assert decisions.costs.timed == [] and decisions.saved == 0.0


# -- the automatic choice ----------------------------------------------------------------------------------------------


def automatic(on_path: bool = True, **values: Any) -> Controller:
    return controller(on_path, **{"control_fraction": 0.0, "variance_budget": 1.25, **values})


def test_exact_steps_and_a_prediction_are_timed_before_anything_is_observed() -> None:
    decisions, labels, reviews = automatic(), [], []
    for _ in range(8):
        labels.append(decisions.label(False, 8))
        assert decisions.observes(False) == (labels[-1] == OBSERVED)
        assert decisions.rehearses(False) == (len(labels) == 5) and not decisions.rests(False)
        decisions.advance(ready=False)
        reviews.append(decisions.review_due(False))
    assert labels == [None, EXACT, EXACT, EXACT, None, OBSERVED, OBSERVED, OBSERVED]
    assert reviews == [False] * 4 + [True] + [False] * 3
    assert decisions.review_due(ready=True)


@pytest.mark.parametrize("prediction", [0.4, 1.05])
def test_where_predictions_alone_are_too_dear_nothing_is_observed(prediction: float) -> None:
    decisions = automatic()
    advance(decisions, 5, ready=False)
    decisions.review(
        [*readings((EXACT, 1.0)), (REHEARSED, 10.0, prediction), (REHEARSED, 10.0, 5.0)], explained(0.0, 0.0)
    )
    assert decisions.saved == pytest.approx(-10 * (prediction + 5.0))
    advance(decisions, 1, ready=False)
    kinds = []
    for _ in range(600):
        kinds.append((decisions.rests(False), decisions.observes(False), decisions.rehearses(False)))
        decisions.advance(ready=False)
    if prediction < 1.0:
        assert set(kinds) == {(False, True, False)}
    else:
        rehearsals = [number + 6 for number, kind in enumerate(kinds) if kind == (False, False, True)]
        assert rehearsals == [64, 512], "the machine may have been busy"
        assert kinds.count((True, False, False)) == 600 - 2 * (4 + 2), "some are timed before, and a review comes after"
        decisions.review([(REHEARSED, 10.0, 0.4)], explained(0.0, 0.0))
        assert decisions.observes(False) and not decisions.rests(False)


def test_micro_batches_too_small_for_any_fraction_are_not_predicted() -> None:
    decisions = automatic()
    for _ in range(5):
        decisions.label(False, 2)
        decisions.advance(ready=False)
    assert not decisions.review([*readings((EXACT, 1.0)), (REHEARSED, 10.0, 0.1)], explained(0.0, 0.0))
    assert decisions.plan == EXACT and not decisions.observes(False)


def test_a_probe_insists() -> None:
    decisions = automatic()
    decisions.insists = True
    advance(decisions, 5, ready=False)
    assert not decisions.rehearses(False) and decisions.observes(False)
    decisions.review([*readings((EXACT, 1.0)), (REHEARSED, 10.0, 1.2)], explained(0.0, 0.0))
    assert decisions.observes(False)


def test_between_looks_exact_steps_pass_by() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0), (OBSERVED, 1.1)), explained(0.0, 0.0))
    assert decisions.plan == EXACT
    timeline = ""
    for _ in range(40):
        rests, looks = decisions.rests(True), decisions.observes(True)
        assert not (rests and (looks or decisions.review_due(True)))
        timeline += "." if rests else "L" if looks else "r" if decisions.review_due(True) else "t"
        decisions.advance(ready=True)
    assert timeline == "r" + "." * 11 + "ttttLr" + "." * 10 + "ttttLr" + "." * 6


def test_good_predictions_are_used_and_their_price_follows_from_what_was_measured() -> None:
    decisions = automatic()
    until_review(decisions)
    assert decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.96))
    tried = decisions.plan
    assert tried.fraction < 1.0 and decisions.now(ready=True) == tried
    decisions.review(readings((tried, 0.6)), explained(0.95, 0.96))
    assert decisions.costs.relative(tried) == pytest.approx(0.6)
    assert decisions.saved == pytest.approx(16 * 10 * 0.4)


@pytest.mark.parametrize("on_path", [True, False])
def test_bad_predictions_are_not_used(on_path: bool) -> None:
    decisions = automatic(on_path)
    until_review(decisions)
    assert not decisions.review(readings((EXACT, 1.0)), explained(0.2, 0.3))
    assert decisions.plan == decisions.now(ready=True) == EXACT and decisions.price == 1.0


def test_a_plan_that_turns_out_dear_is_left_and_not_tried_again_until_it_looks_cheaper() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.95))
    for _ in range(10):  # every plan costs more than an exact step
        if decisions.plan.exact:
            break
        decisions.review(readings((EXACT, 1.0), (decisions.plan, 1.2)), explained(0.95, 0.95))
    assert decisions.plan == EXACT and decisions.saved < 0
    assert not decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.95))
    assert decisions.review(readings((EXACT, 2.5)), explained(0.95, 0.95)), "exact steps became dearer"


def test_it_comes_back_when_predictions_become_good() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0)), explained(0.1, 0.1))
    assert decisions.plan == EXACT
    assert decisions.review([], explained(0.95, 0.95)) and not decisions.plan.exact


def test_the_variance_budget_is_kept() -> None:
    strict, free = automatic(variance_budget=1.05), automatic(variance_budget=0.0)
    for decisions in (strict, free):
        until_review(decisions)
        decisions.review(readings((EXACT, 1.0)), explained(0.9, 0.9))
    assert free.plan.fraction < strict.plan.fraction or strict.plan.exact


def test_the_worst_part_counts_for_half() -> None:
    fractions = []
    for overall, worst in ((0.9, 0.9), (0.95, 0.85), (0.95, 0.4), (0.4, 0.0)):
        decisions = automatic(variance_budget=1.5)
        until_review(decisions)
        decisions.review(readings((EXACT, 1.0)), (Explained(overall, worst), Explained(overall, worst)))
        fractions.append(decisions.plan.fraction)
    assert fractions[0] == fractions[1] < fractions[2] < fractions[3] == 1.0


def test_a_plan_that_was_never_timed_is_reviewed_soon() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.95))
    assert not decisions.plan.exact
    due = []
    for step in range(1, 20):
        decisions.advance(ready=True)
        if decisions.review_due(ready=True):
            due.append(step)
    assert due == [7, 14]


def test_the_regression_is_used_where_it_explains_enough_more() -> None:
    alike, apart = automatic(), automatic()
    for decisions, both in ((alike, 0.901), (apart, 0.99)):
        until_review(decisions)
        decisions.review(readings((EXACT, 1.0)), explained(0.9, both))
    assert not alike.plan.ridge and apart.plan.ridge
    alone = automatic(on_path=False)
    until_review(alone)
    alone.review(readings((EXACT, 1.0)), explained(0.0, 0.9))
    assert alone.plan.ridge and not alone.plan.exact


def test_exact_steps_are_timed_now_and_then_while_a_plan_predicts() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.95))
    kinds = []
    for _ in range(1010):
        label = decisions.label(True, 8)
        kinds.append(label)
        assert label is None or label.exact == decisions.now(True).exact
        if decisions.now(True).exact:
            assert not decisions.observes(True)
        decisions.advance(True)
    assert kinds.count(EXACT) == 4 + 10 and kinds.count(None) == 2, "after a change some steps are not timed"


@pytest.mark.parametrize(("observed", "most"), [(1.0, 40), (1.1, 42), (3.0, 10)])
def test_while_exact_it_looks_as_rarely_as_looking_is_dear(observed: float, most: int) -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0), (OBSERVED, observed)), explained(0.0, 0.0))
    looks = 0
    for _ in range(1024):
        looks += decisions.observes(True)
        assert decisions.label(True, 8) in (EXACT, OBSERVED)
        decisions.advance(True)
    assert 0 < looks <= most
    rare = looks - 7  # those after 16, 32, ..., 1024 micro-batches
    assert rare * (observed - 1.0) <= 0.005 * 1024


def test_where_no_prediction_can_pay_it_hardly_looks() -> None:
    looks = []
    for cost in (0.6, 1.2):
        decisions = automatic()
        until_review(decisions)
        decisions.review(readings((EXACT, 1.0), (OBSERVED, 1.5)), explained(0.95, 0.95))
        # Every plan was tried and found as dear as that; then nothing is explained any more.
        tried = [(Plan(fraction, ridge), cost) for fraction in decisions.fractions for ridge in (False, True)]
        decisions.review(readings(*tried), explained(0.0, 0.0))
        assert decisions.plan == EXACT
        looks.append(0)
        for _ in range(1024):
            looks[-1] += decisions.observes(True)
            decisions.advance(True)
    assert looks[0] >= 7 and looks[1] == 0


def test_what_was_found_too_dear_gets_another_trial_after_a_long_time() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0), (OBSERVED, 1.1)), explained(0.95, 0.95))
    tried = decisions.plan
    decisions.review(readings((tried, 1.2)), explained(0.95, 0.95))
    assert decisions.plan == EXACT and not decisions.best().fraction < 1.0
    steps = 0
    while decisions.rests(True) or not decisions.observes(True):
        decisions.advance(True)
        steps += 1
    assert 1500 <= steps <= 3000, "trials of seven dear steps in so many are not felt"
    decisions.advance(True)
    assert decisions.review_due(True) and decisions.review([], explained(0.95, 0.95)) and not decisions.plan.exact


def test_a_plan_that_was_tried_on_a_busy_machine_gets_another_trial_at_the_next_look() -> None:
    decisions = automatic()
    until_review(decisions)
    decisions.review([*readings((EXACT, 1.0), (OBSERVED, 1.1)), (REHEARSED, 10.0, 0.4)], explained(0.9, 0.9))
    tried = decisions.plan
    decisions.review(readings((tried, 0.95)), explained(0.9, 0.9))
    assert decisions.plan == EXACT and not tried.exact
    steps = 0
    while not decisions.observes(True):
        decisions.advance(True)
        steps += 1
    assert steps <= 16
    decisions.advance(True)
    assert decisions.review_due(True) and decisions.review([], explained(0.9, 0.9)) and decisions.plan == tried


def test_smaller_micro_batches_than_usual_are_not_timed() -> None:
    decisions = automatic()
    advance(decisions, 1, ready=False)  # the first sets things up
    assert decisions.label(False, 8) is not None
    assert decisions.label(False, 5) is None
    assert decisions.label(False, 8) is not None


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_state_is_restored_by_way_of_json(fraction: float) -> None:
    decisions = controller(control_fraction=fraction)
    until_review(decisions) if fraction == 0.0 else advance(decisions, 11)
    if fraction == 0.0:
        decisions.review(readings((EXACT, 1.0), (OBSERVED, 1.1)), explained(0.9, 0.95))
    decisions.refitted()
    decisions.advance(True)
    restored = controller(control_fraction=fraction)
    restored.load_state_dict(json.loads(json.dumps(decisions.state_dict())))
    assert restored.state_dict() == decisions.state_dict()
    assert restored.plan == decisions.plan and restored.price == decisions.price


def test_a_fixed_fraction_wins_over_a_restored_plan() -> None:
    decisions, fixed = automatic(), controller()
    until_review(decisions)
    decisions.review(readings((EXACT, 1.0)), explained(0.95, 0.95))
    assert decisions.plan.fraction != 0.5 and not decisions.plan.ridge
    fixed.load_state_dict(decisions.state_dict())
    assert fixed.plan == Plan(0.5, ridge=False)
    alone = controller(on_path=False)
    alone.load_state_dict(decisions.state_dict())
    assert alone.plan == Plan(0.5, ridge=True)
