"""Groups of rows: every row in one, and each example by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lgp.rows.groups import follow_singly, group_rows, row_weights


@given(rows=st.integers(2, 9), groups=st.integers(1, 9), seed=st.integers(0, 9))
def test_every_row_is_in_one_group(rows: int, groups: int, seed: int) -> None:
    member = group_rows(torch.randn(3, rows, 4, generator=torch.Generator().manual_seed(seed)), groups)
    assert member.shape == (3, rows, groups)
    assert torch.equal(member.sum(-1), torch.ones(3, rows))


def test_an_example_is_grouped_without_regard_to_others() -> None:
    rows = torch.randn(5, 12, 4)
    member = group_rows(rows, 4)
    assert torch.equal(group_rows(rows[[3, 1]], 4), member[[3, 1]])


def test_neighbouring_similar_rows_come_together() -> None:
    left, right = torch.randn(2, 8)
    rows = torch.stack([torch.randn(8), *[left] * 4, *[right] * 4])[None] + 0.01 * torch.randn(1, 9, 8)
    code = group_rows(rows, 2).argmax(-1)[0, 1:]
    assert len(set(code[:4].tolist())) == len(set(code[4:].tolist())) == 1 and code[0] != code[4]


@given(seed=st.integers(0, 20), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_weights_sum_to_one_whatever_the_unit_of_what_was_asked(seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    member = group_rows(torch.randn(2, 9, 4, generator=draw, dtype=torch.float64), 3)
    asked = torch.rand(2, 9, 1, generator=draw, dtype=torch.float64) + 0.1
    weights = row_weights(member, asked)
    torch.testing.assert_close(weights, row_weights(member, scale * asked))
    filled = member.sum(1) > 0
    torch.testing.assert_close(weights.sum(1), filled.to(weights.dtype))


@pytest.mark.parametrize("asked", [1e-20, 1.0])
def test_rows_that_were_asked_alike_count_alike(asked: float) -> None:
    member = group_rows(torch.randn(1, 9, 4), 2)
    weights = row_weights(member, torch.full((1, 9, 1), asked))
    torch.testing.assert_close(weights, member / member.sum(1, keepdim=True).clamp(min=1))


@given(rows=st.integers(2, 9), singly=st.integers(1, 9), scale=st.sampled_from([0.3, 2.0]), seed=st.integers(0, 9))
def test_rows_that_were_asked_most_leave_their_groups(rows: int, singly: int, scale: float, seed: int) -> None:
    draw, singly = torch.Generator().manual_seed(seed), min(singly, rows)
    member = group_rows(torch.randn(3, rows, 4, generator=draw), 2)
    asked = torch.rand(3, rows, 1, generator=draw)
    followed = follow_singly(member, asked, singly)
    assert followed.shape == (3, rows, singly + 2) and torch.equal(followed.sum(-1), torch.ones(3, rows))
    assert torch.equal(followed[..., :singly].sum(1), torch.ones(3, singly))
    assert torch.equal(followed[..., 0].argmax(1), asked[..., 0].argmax(1)), "the one asked most comes first"
    for row, by in zip(followed[..., :singly].sum(-1).bool(), asked[..., 0], strict=True):
        assert row.all() or by[row].min() >= by[~row].max()
    assert torch.equal(followed, follow_singly(member, scale * asked, singly)), "the unit does not matter"
