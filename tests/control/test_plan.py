"""Draws: uniform, private, and the same wherever they are made again."""

from __future__ import annotations

import itertools
from collections import Counter

import torch

from hf_lgp.control.plan import StepPlan, draw_order, private_seed

CPU = torch.device("cpu")


def test_a_draw_is_a_permutation_with_its_inverse_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    order, inverse = draw_order(9, 5, CPU)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(order[inverse], torch.arange(9)) and sorted(order.tolist()) == list(range(9))
    assert torch.equal(draw_order(9, 5, CPU)[0], order)


def test_every_control_set_is_as_likely_as_any_other() -> None:
    counts = Counter(tuple(sorted(draw_order(5, private_seed(0, k), CPU)[0][:2].tolist())) for k in range(4000))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    assert all(abs(count - 400) < 5 * 19 for count in counts.values())


def test_seeds_differ_by_every_key() -> None:
    keys = list(itertools.product(range(3), repeat=4))
    assert len({private_seed(*key) for key in keys}) == len(keys)


def test_a_plan_is_plain_where_nothing_differs_from_trainer() -> None:
    assert StepPlan().plain and StepPlan(seed=3).plain
    for plan in (StepPlan(0.5), StepPlan(measure=8), StepPlan(first_row=True), StepPlan(all_control=True)):
        assert not plan.plain
