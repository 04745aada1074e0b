"""Prequential moments and what follows from them, against least squares on explicit samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.alignment import MOMENTS, Alignment

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)
TENSORS = 3


def samples(seed: int, count: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated ``g``, ``p`` and ``r`` of ``count`` examples with their means removed, shape ``(TENSORS, count)`` each."""
    generator = torch.Generator().manual_seed(seed)
    path, ridge, noise = torch.randn(3, TENSORS, count, generator=generator, dtype=torch.float64)
    ridge = ridge + 0.4 * path
    exact = 0.9 * path + 0.5 * ridge + noise
    g, p, r = (x - x.mean(1, keepdim=True) for x in (exact, path, ridge))
    return g, p, r


def moments_of(g: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """Sums of products by name, shape ``(6, TENSORS)``."""
    parts = {"g": g, "p": p, "r": r}
    return torch.stack([(parts[a] * parts[b]).sum(1) for a, b in MOMENTS])


def random_moments(seed: int) -> Tensor:
    return moments_of(*samples(seed))


def alignment(**options: float) -> Alignment:
    return Alignment(TENSORS, dtype=torch.float64, **options)  # type: ignore[arg-type]


def updated(moments: Tensor) -> Alignment:
    tracked = alignment()
    tracked.update(moments)
    return tracked


def least_squares(g: Tensor, *parts: Tensor) -> Tensor:
    """Coefficients of ``g`` on ``parts``, tensor by tensor, shape ``(TENSORS, parts)``."""
    design = torch.stack(parts, dim=-1)
    return torch.stack([torch.linalg.lstsq(x, y[:, None]).solution[:, 0] for x, y in zip(design, g, strict=True)])


@quick
@given(seed=seeds)
def test_coefficients_are_those_of_least_squares(seed: int) -> None:
    g, p, r = samples(seed)
    actual = torch.stack(updated(moments_of(g, p, r)).coefficients, dim=-1)
    exact = least_squares(g, p, r)
    # The small relative ridge moves the solution, in units of equal variance, by at most its share of the smallest eigenvalue.
    size = torch.stack([p.norm(dim=1), r.norm(dim=1)], dim=-1)
    smallest = 1.0 - ((p * r).sum(1) / size.prod(1)).abs()
    shift = ((actual - exact.clamp(0.0, 2.0)) * size).norm(dim=1)
    assert (shift <= 1.001e-3 / smallest * (exact * size).norm(dim=1)).all()


def test_coefficients_are_close_to_those_of_least_squares_on_many_examples() -> None:
    g, p, r = samples(0, count=200)
    actual = torch.stack(updated(moments_of(g, p, r)).coefficients, dim=-1)
    torch.testing.assert_close(actual, least_squares(g, p, r), rtol=0, atol=5e-3)


@quick
@given(seed=seeds)
def test_beta_is_the_paths_own_coefficient(seed: int) -> None:
    g, p, r = samples(seed)
    torch.testing.assert_close(updated(moments_of(g, p, r)).beta, least_squares(g, p)[:, 0].clamp(0.0, 2.0))


@pytest.mark.parametrize("absent", [0, 1])
def test_where_one_part_is_absent_the_other_has_its_own_coefficient(absent: int) -> None:
    g, *parts = samples(3)
    parts[absent] = torch.zeros_like(g)
    tracked = updated(moments_of(g, *parts))
    own = least_squares(g, parts[1 - absent])[:, 0]
    assert (own > 0).all() and (own < 2).all()
    assert tracked.coefficients[absent].eq(0).all()
    torch.testing.assert_close(tracked.coefficients[1 - absent], own, rtol=1.5e-3, atol=0)
    torch.testing.assert_close(tracked.beta, torch.ones_like(own) if absent == 0 else own)


def test_parts_may_coincide() -> None:
    g, p, _ = samples(4)
    g = g + 2 * p
    path, ridge = updated(moments_of(g, p, p)).coefficients
    own = least_squares(g, p)[:, 0]
    assert (own > 0.5).all() and (own < 4).all()
    torch.testing.assert_close(torch.stack([path, ridge]), own.expand(2, -1) / 2, rtol=1.5e-3, atol=0)


def test_coefficients_are_clipped() -> None:
    _, p, r = samples(5, count=50)
    for factor, expected in ((-1.0, 0.0), (3.0, 2.0)):
        for values in updated(moments_of(factor * (p + r), p, r)).coefficients:
            assert values.tolist() == [expected] * TENSORS
        assert updated(moments_of(factor * p, p, r)).beta.tolist() == [expected] * TENSORS


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_coefficients_do_not_depend_on_the_unit_of_gradients(scale: float) -> None:
    moments = random_moments(6)
    single = Alignment(TENSORS)
    single.update((moments * scale**2).float())
    for actual, expected in zip(single.coefficients, updated(moments).coefficients, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single.beta.double(), updated(moments).beta, rtol=1e-4, atol=1e-4)


def test_batches_are_averaged_exponentially() -> None:
    tracked, batches = alignment(decay=0.8), [samples(seed) for seed in range(3)]
    for batch in batches:
        tracked.update(moments_of(*batch))
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    averaged = torch.einsum("b,bml->ml", weights, torch.stack([moments_of(*batch) for batch in batches]))
    torch.testing.assert_close(tracked.moments, averaged / weights.sum())
    # One regression on all batches, each example weighed by its batch.
    weighed = [
        torch.cat([w.sqrt() * x for w, x in zip(weights, part, strict=True)], 1) for part in zip(*batches, strict=True)
    ]
    torch.testing.assert_close(tracked.beta, least_squares(*weighed[:2])[:, 0].clamp(0.0, 2.0))
    torch.testing.assert_close(
        torch.stack(tracked.coefficients, dim=-1), least_squares(*weighed).clamp(0.0, 2.0), rtol=0, atol=5e-3
    )
    assert tracked.batches == 3


def test_one_batch_counts_in_full() -> None:
    torch.testing.assert_close(updated(random_moments(1)).moments, random_moments(1))


def readings(tracked: Alignment) -> list[Tensor]:
    return [
        tracked.moments,
        tracked.beta,
        *tracked.coefficients,
        tracked.rho2,
        tracked.path_rho2,
        tracked.captured,
        tracked.variance,
    ]


def assert_nothing_known(tracked: Alignment) -> None:
    path, ridge = tracked.coefficients
    nothing = (path, 0.0), (ridge, 0.0), (tracked.rho2, 0.0), (tracked.path_rho2, 0.0), (tracked.variance, 0.0)
    for values, expected in (*nothing, (tracked.beta, 1.0), (tracked.captured, 1.0)):
        assert values.tolist() == [expected] * TENSORS
    assert tracked.moments.eq(0).all()


def test_nothing_is_trusted_before_the_first_batch() -> None:
    assert_nothing_known(alignment())
    assert alignment().batches == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", range(len(MOMENTS)))
def test_non_finite_batches_are_left_out(value: float, row: int) -> None:
    tracked, clean = alignment(), alignment()
    spoilt = random_moments(1)
    spoilt[row, 1] = value
    for moments in (random_moments(0), spoilt, random_moments(2)):
        tracked.update(moments)
        if moments is not spoilt:
            clean.update(moments)
    for actual, expected in zip(readings(tracked), readings(clean), strict=True):
        assert torch.equal(actual, expected)


def energies(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energies of error, total, kept and remainder with ``error < total`` and ``kept < remainder < total``."""
    total, error, remainder, kept = torch.rand(
        4, TENSORS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    total = total + 0.5
    remainder = remainder * total
    return error * total, total, kept * remainder, remainder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", range(4))
def test_non_finite_energies_are_left_out(value: float, row: int) -> None:
    tracked, clean, spoilt = alignment(), alignment(), energies(1)
    spoilt[row][2] = value
    for batch in (energies(0), spoilt, energies(2)):
        tracked.update_energies(*batch)
        if batch is not spoilt:
            clean.update_energies(*batch)
    for actual, expected in zip(readings(tracked), readings(clean), strict=True):
        assert torch.equal(actual, expected)


def test_a_non_finite_first_batch_changes_nothing() -> None:
    tracked, spoilt = alignment(), torch.full((len(MOMENTS), TENSORS), torch.nan)
    tracked.update(spoilt)
    tracked.update_energies(*spoilt[:4])
    assert_nothing_known(tracked)


@quick
@given(seed=seeds)
def test_shares_follow_from_energies(seed: int) -> None:
    tracked, (error, total, kept, remainder) = alignment(), energies(seed)
    tracked.update_energies(error, total, kept, remainder)
    torch.testing.assert_close(tracked.rho2, 1.0 - error / total)
    torch.testing.assert_close(tracked.path_rho2, 1.0 - remainder / total)
    torch.testing.assert_close(tracked.captured, kept / remainder)
    torch.testing.assert_close(tracked.variance / tracked.variance.sum(), total / total.sum())


def test_energies_are_averaged_before_they_are_divided() -> None:
    tracked, batches = alignment(), [energies(seed) for seed in range(3)]
    for batch in batches:
        tracked.update_energies(*batch)
    error, total, kept, remainder = (
        sum((w * x for w, x in zip((0.25, 0.5, 1.0), part, strict=True)), torch.zeros(()))
        for part in zip(*batches, strict=True)
    )
    torch.testing.assert_close(tracked.rho2, 1.0 - error / total)
    torch.testing.assert_close(tracked.path_rho2, 1.0 - remainder / total)
    torch.testing.assert_close(tracked.captured, kept / remainder)


def test_shares_stay_between_zero_and_one() -> None:
    tracked, (_, total, _, _) = alignment(), energies(0)
    tracked.update_energies(3 * total, total, 2.5 * total, 2 * total)  # predictions that do harm, and rounding
    assert tracked.rho2.eq(0).all() and tracked.path_rho2.eq(0).all() and tracked.captured.eq(1).all()


def test_rho2_at_least_squares_coefficients_is_the_squared_correlation() -> None:
    g, p, r = samples(7)
    path, ridge = least_squares(g, p, r).mT
    predicted = path[:, None] * p + ridge[:, None] * r
    tracked = alignment()
    error, total, remainder = (x.square().sum(1) for x in (g - predicted, g, g - least_squares(g, p) * p))
    tracked.update_energies(error, total, remainder, remainder)
    correlation = (g * predicted).sum(1).square() / (g.square().sum(1) * predicted.square().sum(1))
    torch.testing.assert_close(tracked.rho2, correlation)
    assert (tracked.path_rho2 < tracked.rho2).all()


def test_state_is_restored() -> None:
    tracked, restored = alignment(), alignment()
    tracked.update(random_moments(0))
    tracked.update_energies(*energies(0))
    state = {name: value.clone() for name, value in tracked.state_dict().items()}
    restored.load_state_dict(state)
    for value in state.values():  # what was loaded is a copy
        value.zero_()
    for one in (tracked, restored):
        one.update(random_moments(1))
        one.update_energies(*energies(1))
    assert restored.batches == tracked.batches == 2
    for name, value in tracked.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
    for actual, expected in zip(readings(restored), readings(tracked), strict=True):
        assert torch.equal(actual, expected)


def test_a_state_of_other_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="number of tensors"):
        alignment().load_state_dict(Alignment(4).state_dict())
