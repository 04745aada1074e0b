"""Plans: what a micro-batch may do, what each plan costs and how noisy it is, and which one to follow.

A plan is a control fraction with or without the regression. Its price is formula (4) of the estimator with measured figures: the
time of a step over that of an exact one, times the variance of its gradient over that of the exact one. Plain training has price
1; a plan above that is a loss, whatever it saves per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .old_estimator import control_size, relative_variance


@dataclass(frozen=True, order=True)
class Plan:
    """How a micro-batch is trained on.

    Attributes:
        fraction: Control fraction ``f`` in (0, 1]; 1 is an exact step. (0 labels times of predictions alone, and is never followed.)
        ridge: Whether the regression predicts what the class path leaves over; without a path it is all there is.
    """

    fraction: float
    ridge: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing is predicted."""
        return self.fraction >= 1.0


EXACT = Plan(1.0)

FRACTIONS = (0.125, 0.25, 0.375, 0.5)
"""Control fractions to choose from: few, so that shapes, and with them compiled graphs and buffers, stay few."""

HYSTERESIS = 0.97
"""A plan is left only for one whose price is lower by this factor: prices are measured, and every change costs a little."""

RIDGE_COST = 1.03
"""What the regression on top of the path takes, in steps without it, where steps are not timed."""


def variance_of(plan: Plan, rho2: float, examples: int = 0) -> float:
    """Variance of a plan's gradient over that of the exact one.

    Args:
        plan: The plan.
        rho2: Share of the gradient's variance that its predictions explain.
        examples: Size of the micro-batch, whose control examples are a whole number; 0 for any.
    """
    fraction = control_size(examples, plan.fraction) / examples if examples else plan.fraction
    return relative_variance(fraction, rho2)


def price_of(plan: Plan, cost: float, rho2: float, examples: int = 0) -> float:
    """Price of a plan: variance times cost, both relative to exact training.

    Args:
        plan: The plan.
        cost: Time of its step over that of an exact step.
        rho2: Share of the gradient's variance that its predictions explain.
        examples: Size of the micro-batch; 0 for any.
    """
    return 1.0 if plan.exact else cost * variance_of(plan, rho2, examples)


@dataclass(frozen=True)
class Explained:
    """Shares of the variance of per-example gradients that predictions explain.

    Attributes:
        overall: Of the whole trunk, every parameter counting alike.
        worst: Of that part of the model, a block or the embeddings, of which it is least.
    """

    overall: float = 0.0
    worst: float = 0.0

    @property
    def share(self) -> float:
        """The share that counts: half of it the worst part's, on which early progress hangs."""
        return 0.5 * (self.overall + self.worst)


def choose(
    current: Plan,
    candidates: Sequence[Plan],
    costs: Mapping[Plan, float],
    rho2: Mapping[bool, Explained],
    budget: float,
    examples: int = 0,
) -> Plan:
    """The plan of least price within the variance budget, the current one unless another is clearly better.

    Args:
        current: The plan followed so far.
        candidates: Plans to choose from besides exact training.
        costs: Cost of each candidate relative to an exact step.
        rho2: Shares of variance explained, without and with the regression.
        budget: Largest variance of the gradient relative to the exact one; exact training keeps to any budget.
        examples: Size of the micro-batch; 0 for any.
    """
    prices = {
        plan: price_of(plan, costs[plan], rho2[plan.ridge].share, examples)
        for plan in candidates
        # The budget is a little wider for the present plan, since the figures are noisy.
        if HYSTERESIS ** (plan == current) * variance_of(plan, rho2[plan.ridge].share, examples) <= budget
    }
    prices[EXACT] = 1.0
    best = min(prices, key=lambda plan: prices[plan])
    stays = prices.get(current, 2.0) <= 1.0 and prices[best] > HYSTERESIS * prices[current]
    return current if stays else best


def choose_ridge(plan: Plan, rho2: Mapping[bool, Explained], examples: int = 0) -> Plan:
    """The plan of a fixed control fraction on a class path: with the regression only if it lowers the variance by what it costs.

    Args:
        plan: The plan followed so far, which stands while nothing was measured.
        rho2: Shares of variance explained, without and with the regression.
        examples: Size of the micro-batch; 0 for any.
    """
    if not any(explained.overall for explained in rho2.values()):
        return plan
    without, with_ridge = (variance_of(plan, rho2[ridge].share, examples) for ridge in (False, True))
    return replace(plan, ridge=RIDGE_COST * with_ridge < without)
