"""Prequential moments against direct computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.alignment import Alignment


def random_sums(seed: int, tensors: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Centred sums of squares and products of correlated examples, shape ``(tensors,)`` each."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(tensors, 9, generator=generator, dtype=torch.float64)
    guess = 0.7 * exact + 0.4 * torch.randn(tensors, 9, generator=generator, dtype=torch.float64)
    exact, guess = exact - exact.mean(1, keepdim=True), guess - guess.mean(1, keepdim=True)
    return exact.square().sum(1), guess.square().sum(1), (exact * guess).sum(1)


def alignment(**options: float) -> Alignment:
    return Alignment(3, dtype=torch.float64, **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_one_batch_counts_in_full(seed: int) -> None:
    tracked, (variance, predicted, covariance) = alignment(), random_sums(seed)
    tracked.update(variance, predicted, covariance)
    torch.testing.assert_close(tracked.moments, torch.stack([variance, predicted, covariance]))
    torch.testing.assert_close(tracked.alpha, (covariance / predicted).clamp(0, 2))
    torch.testing.assert_close(tracked.rho2, covariance.clamp(min=0) ** 2 / (variance * predicted))


def test_batches_are_averaged_exponentially() -> None:
    tracked, batches = alignment(decay=0.8), [torch.stack(random_sums(seed)) for seed in range(3)]
    for sums in batches:
        tracked.update(*sums)
    weights = [0.8**2, 0.8, 1.0]
    expected = sum((w * s for w, s in zip(weights, batches, strict=True)), torch.zeros(())) / sum(weights)
    torch.testing.assert_close(tracked.moments, expected)
    torch.testing.assert_close(tracked.alpha, (expected[2] / expected[1]).clamp(0, 2))
    torch.testing.assert_close(tracked.rho2, expected[2].clamp(min=0) ** 2 / (expected[0] * expected[1]))
    assert tracked.batches == 3


def test_nothing_is_trusted_before_the_first_batch() -> None:
    tracked = alignment()
    for values, expected in ((tracked.alpha, 0.0), (tracked.rho2, 0.0), (tracked.captured, 1.0)):
        assert values.tolist() == [expected] * 3
    assert tracked.moments.eq(0).all() and tracked.batches == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_non_finite_batches_are_left_out(value: float, row: int) -> None:
    tracked, clean = alignment(), alignment()
    spoilt = torch.stack(random_sums(1))
    spoilt[row, 1] = value
    for sums in (torch.stack(random_sums(0)), spoilt, torch.stack(random_sums(2))):
        tracked.update(*sums)
        if sums is not spoilt:
            clean.update(*sums)
    assert torch.equal(tracked.moments, clean.moments)
    assert torch.equal(tracked.alpha, clean.alpha) and torch.equal(tracked.rho2, clean.rho2)


def test_a_non_finite_first_batch_changes_nothing() -> None:
    tracked, spoilt = alignment(), torch.full((3,), torch.nan)
    tracked.update(spoilt, spoilt, spoilt)
    tracked.update_captured(spoilt, spoilt)
    assert tracked.alpha.eq(0).all() and tracked.rho2.eq(0).all() and tracked.captured.eq(1).all()


def test_captured_energy_scales_rho2() -> None:
    tracked, sums = alignment(), random_sums(0)
    tracked.update(*sums)
    whole = tracked.rho2
    kept, total = torch.tensor([1.0, 0.0, 3.0]).double(), torch.tensor([2.0, 4.0, 3.0]).double()
    tracked.update_captured(kept, total)
    torch.testing.assert_close(tracked.captured, torch.tensor([0.5, 0.0, 1.0]).double())
    torch.testing.assert_close(tracked.rho2, whole * torch.tensor([0.5, 0.0, 1.0]).double())
    tracked.update_captured(2 * total, 2 * total)
    torch.testing.assert_close(tracked.captured, (kept + 4 * total) / (5 * total))
    tracked.update_captured(torch.full((3,), torch.inf).double(), total)
    torch.testing.assert_close(tracked.captured, (kept + 4 * total) / (5 * total))


def test_state_is_restored() -> None:
    tracked, restored = alignment(), alignment()
    tracked.update(*random_sums(0))
    tracked.update_captured(torch.ones(3), 2 * torch.ones(3))
    state = {name: value.clone() for name, value in tracked.state_dict().items()}
    restored.load_state_dict(state)
    for value in state.values():  # what was loaded is a copy
        value.zero_()
    for one in (tracked, restored):
        one.update(*random_sums(1))
        one.update_captured(torch.ones(3), torch.ones(3))
    assert restored.batches == tracked.batches == 2
    for name, value in tracked.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
    assert torch.equal(restored.rho2, tracked.rho2)


def test_a_state_of_other_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="number of tensors"):
        alignment().load_state_dict(Alignment(4).state_dict())
