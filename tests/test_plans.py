"""Plans: prices by the estimator's formulas, and a choice that keeps to them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lgp.old_estimator import relative_variance
from hf_lgp.plans import EXACT, FRACTIONS, HYSTERESIS, RIDGE_COST, Explained, Plan, choose, choose_ridge, price_of

PLANS = [Plan(f, ridge) for f in FRACTIONS for ridge in (False, True)]
shares = st.floats(0.0, 1.0)


def test_exact_training_has_price_one() -> None:
    assert price_of(EXACT, cost=7.0, rho2=0.3) == 1.0


def test_a_price_is_cost_times_variance() -> None:
    assert price_of(Plan(0.25), cost=0.5, rho2=0.9) == pytest.approx(0.5 * (1 - 0.75 * 0.9) / 0.25)


@given(
    st.sampled_from([EXACT, *PLANS]),
    st.lists(st.floats(0.05, 3.0), min_size=len(PLANS), max_size=len(PLANS)),
    st.tuples(shares, shares),
    st.tuples(shares, shares),
    st.sampled_from([1.1, 1.5, math.inf]),
)
def test_the_choice(
    current: Plan, costs: list[float], alone: tuple[float, float], both: tuple[float, float], budget: float
) -> None:
    rho2, cost = {False: Explained(*alone), True: Explained(*both)}, dict(zip(PLANS, costs, strict=True))
    chosen = choose(current, PLANS, cost, rho2, budget)

    def price(plan: Plan) -> float:
        return price_of(plan, cost.get(plan, 1.0), rho2[plan.ridge].share)

    def wide(plan: Plan) -> float:
        return budget / HYSTERESIS if plan == current else budget

    allowed = [EXACT, *(p for p in PLANS if relative_variance(p.fraction, rho2[p.ridge].share) <= wide(p))]
    assert chosen in allowed, "the budget is kept"
    assert HYSTERESIS * price(chosen) <= min(price(plan) for plan in allowed) * (1 + 1e-12)
    if chosen != current and current in allowed and price(current) <= 1.0:
        assert price(chosen) <= HYSTERESIS * price(current), "a change has to be worth it"
    assert price(chosen) <= 1.0, "never worse than exact training"


def test_without_any_correlation_nothing_is_predicted() -> None:
    free = dict.fromkeys(PLANS, 1e-9)
    dear = {plan: plan.fraction for plan in PLANS}  # predictions cost nothing at all
    assert choose(EXACT, PLANS, dear, {False: Explained(), True: Explained()}, math.inf) == EXACT
    assert not choose(EXACT, PLANS, free, {False: Explained(), True: Explained()}, math.inf).exact, (
        "free lunch is taken"
    )


@given(st.sampled_from(PLANS), st.tuples(shares, shares), st.tuples(shares, shares))
def test_the_regression_at_a_fixed_fraction(plan: Plan, alone: tuple[float, float], both: tuple[float, float]) -> None:
    rho2 = {False: Explained(*alone), True: Explained(*both)}
    chosen = choose_ridge(plan, rho2)
    assert chosen.fraction == plan.fraction
    if alone[0] or both[0]:
        prices = {r: price_of(Plan(plan.fraction, r), RIDGE_COST**r, rho2[r].share) for r in (False, True)}
        assert prices[chosen.ridge] == min(prices.values())
    else:
        assert chosen == plan
