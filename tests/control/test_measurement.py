"""Group sums against per-example variances."""

from __future__ import annotations

import pytest
import torch

from hf_lgp.control.measurement import Comparison, GroupSums


def test_groups_of_one_have_the_examples_own_spread() -> None:
    exact, predicted = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    sums = GroupSums()
    for g, p in zip(exact, predicted, strict=True):
        sums.add([g, g[0]], [p, p[0]])
    found = sums.spread()
    residual = exact - predicted
    expected = [(v - v.mean(0)).square().sum() for v in (residual, residual[:, 0], exact, exact[:, 0])]
    torch.testing.assert_close(
        torch.cat([found.residual, found.total]).double(), torch.stack(expected), rtol=1e-5, atol=1e-6
    )


def test_larger_groups_tell_the_same_share() -> None:
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(4000, 20, generator=draw)
    residual = 0.3 * torch.randn(4000, 20, generator=draw)
    sums = GroupSums()
    for g, r in zip(exact.split(500), residual.split(500), strict=True):
        sums.add([g.sum(0)], [(g - r).sum(0)])
    found = sums.spread()
    assert float(found.residual / found.total) == pytest.approx(0.09, rel=0.3)


def test_a_constant_gradient_has_no_spread() -> None:
    sums = GroupSums()
    for _ in range(4):
        sums.add([torch.ones(3)], [torch.zeros(3)])
    assert float(sums.spread().total.max()) == 0.0


def test_blocks_compared_at_once_tell_the_same_and_what_they_share_is_compared_as_one() -> None:
    exact, predicted = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    sums, comparison = GroupSums(), Comparison()
    for g, p in zip(exact, predicted, strict=True):
        sums.add([g[0] + g[1], g[2]], [p[0] + p[1], p[2]])
    found = comparison.add({1: exact[:, 0], 2: None}, {1: predicted[:, 0], 2: None}, later={1})
    assert found.keys() == {1} and torch.equal(found[1], exact[:, 0].sum(0))
    comparison.add({1: exact[:, 1], 3: exact[:, 2]}, {1: predicted[:, 1], 3: predicted[:, 2]}, later=())
    one, other = comparison.spread(), sums.spread()
    torch.testing.assert_close([one.residual, one.total], [other.residual, other.total])
