"""What was not computed cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_lgp.sealed import FirstRow, Sealed, SpliceError

LIKE = torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    "reads", [torch.sum, lambda t: t + 1, lambda t: t[:, 0], lambda t: t.mean(1), lambda t: torch.cat([t, t])]
)
def test_a_sealed_tensor_has_a_shape_and_nothing_else(reads: Any) -> None:
    sealed = Sealed.of(LIKE)
    assert sealed.shape == LIKE.shape and sealed.dtype == LIKE.dtype and len(sealed) == 2
    with pytest.raises(SpliceError, match="read elsewhere"):
        reads(sealed)


def first_row() -> FirstRow:
    return LIKE[:, :1].as_subclass(FirstRow)


@pytest.mark.parametrize(
    "take", [lambda t: t[:, 0], lambda t: t[:, 0, :], lambda t: t[:, :1], lambda t: t.select(1, 0)]
)
def test_the_first_row_can_be_taken(take: Any) -> None:
    taken = take(first_row())
    assert type(taken) is torch.Tensor and torch.equal(taken, take(LIKE))


def test_what_works_row_by_row_gives_the_same_of_its_result() -> None:
    weight = torch.randn(3, 4)
    out = F.linear(F.layer_norm(first_row(), (4,)), weight)[:, 0]
    torch.testing.assert_close(out, F.linear(F.layer_norm(LIKE, (4,)), weight)[:, 0])


@pytest.mark.parametrize(
    "reads",
    [
        lambda t: t.mean(1),
        lambda t: t[:, 1:],
        lambda t: t[:, -1],
        lambda t: t[0],
        lambda t: t[..., 0],
        lambda t: t.select(1, 3),
        lambda t: t * torch.ones(2, 5, 1),
        lambda t: t.flatten(1),
    ],
)
def test_more_than_the_first_row_cannot_be_read(reads: Any) -> None:
    with pytest.raises(SpliceError, match="more than the first row"):
        reads(first_row())


def test_a_gradient_flows_through_the_first_row() -> None:
    rows = LIKE.clone().requires_grad_()
    F.layer_norm(rows[:, :1].as_subclass(FirstRow), (4,))[:, 0].square().sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].abs().sum() > 0 and rows.grad[:, 1:].abs().sum() == 0
