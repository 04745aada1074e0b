"""Bases, coordinates and their re-expression against explicit matrices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.factors import Factors
from hf_lgp.subspace import Subspace, basis_sizes

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
SHAPES = [(6, 5), (1, 7), (9, 4), (6, 5), (2, 8), (1, 7), (6, 5)]  # groups interleave


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(gradients: Tensor) -> Factors:
    return Factors(None, gradients, gradients.shape[1])


def subspace(shapes: Sequence[tuple[int, int]] = SHAPES, rank: int = 3, **options: float) -> Subspace:
    return Subspace(shapes, rank, dtype=torch.float64, **options)  # type: ignore[arg-type]


def gradients_of(shapes: Sequence[tuple[int, int]], examples: int, seed: int) -> list[Tensor]:
    return [randn(examples, *shape, seed=seed + number) for number, shape in enumerate(shapes)]


def coordinates_of(bases: Subspace, gradients: list[Tensor]) -> Tensor:
    """Flat coordinates of all tensors, shape ``(examples, P)``."""
    flat = torch.full((len(gradients[0]), bases.size), torch.nan, dtype=torch.float64)
    for number, segment in enumerate(bases.segments):
        flat[:, segment.start : segment.start + segment.size] = bases.project(number, explicit(gradients[number]))
    return flat


def move(bases: Subspace, gradients: list[Tensor], coordinates: Sequence[Tensor] = ()) -> None:
    for number, gradient in enumerate(gradients):
        bases.accumulate(number, explicit(gradient))
    bases.update(coordinates)


def assert_orthonormal(bases: Subspace) -> None:
    for number in range(len(bases.shapes)):
        for basis in bases.bases(number):
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), rank=st.integers(1, 12))
def test_basis_sizes(rows: int, cols: int, rank: int) -> None:
    left, right = basis_sizes(rows, cols, rank)
    assert min(rows, rank) <= left <= rows and min(cols, rank) <= right <= cols
    assert left * right <= rank * rank
    assert basis_sizes(cols, rows, rank) == (right, left)
    if left < rows and right < cols:
        assert left == right == rank
    if left < rows or right < cols:  # what one side lacks goes to the other, but for a remainder
        assert left * right > rank * rank - min(rows, cols, rank)


@quick
@given(seed=seeds)
def test_lift_undoes_project_on_the_full_space(seed: int) -> None:
    bases, gradients = subspace(rank=9), gradients_of(SHAPES, 2, seed)
    for example, flat in enumerate(coordinates_of(bases, gradients)):
        for gradient, lifted in zip(gradients, bases.lift(flat), strict=True):
            torch.testing.assert_close(lifted, gradient[example])


@quick
@given(seed=seeds)
def test_project_and_lift_are_explicit_products(seed: int) -> None:
    bases, gradients = subspace(), gradients_of(SHAPES, 2, seed)
    move(bases, gradients_of(SHAPES, 4, seed + 100))
    flat = coordinates_of(bases, gradients)
    lifted = bases.lift(flat[1])
    for number, (segment, gradient) in enumerate(zip(bases.segments, gradients, strict=True)):
        left, right = bases.bases(number)
        block = flat[1, segment.start : segment.start + segment.size].reshape(left.shape[1], right.shape[1])
        torch.testing.assert_close(block, left.T @ gradient[1] @ right)
        torch.testing.assert_close(lifted[number], left @ block @ right.T)


def test_segments_partition_the_coordinates() -> None:
    bases = subspace()
    columns = [c for s in bases.segments for c in range(s.start, s.start + s.size)]
    assert sorted(columns) == list(range(bases.size))
    assert [s.size for s in bases.segments] == [left * right for left, right in (basis_sizes(*s, 3) for s in SHAPES)]


def test_every_tensor_may_have_its_own_rank() -> None:
    ranks = [3, 2, 4, 2, 3, 2, 3]
    bases = Subspace(SHAPES, ranks, dtype=torch.float64)
    sizes = [basis_sizes(*shape, rank) for shape, rank in zip(SHAPES, ranks, strict=True)]
    assert [tuple(basis.shape[1] for basis in bases.bases(number)) for number in range(len(SHAPES))] == sizes
    assert bases.size == sum(left * right for left, right in sizes)
    gradients = gradients_of(SHAPES, 2, seed=0)
    move(bases, gradients_of(SHAPES, 4, seed=100))
    for number, lifted in enumerate(bases.lift(coordinates_of(bases, gradients)[0])):
        left, right = bases.bases(number)
        torch.testing.assert_close(lifted, left @ left.T @ gradients[number][0] @ right @ right.T)


def test_sums_and_spreads_by_tensor() -> None:
    bases = subspace()
    values, weights = randn(bases.size, seed=0), randn(len(SHAPES), seed=1)
    sums, spread = bases.per_tensor_sums(values), bases.per_coordinate(weights)
    for number, segment in enumerate(bases.segments):
        columns = slice(segment.start, segment.start + segment.size)
        torch.testing.assert_close(sums[number], values[columns].sum())
        assert spread[columns].eq(weights[number]).all()


@quick
@given(seed=seeds, scale=st.sampled_from([1e-12, 1.0, 1e9]), tokens=st.integers(1, 3))
def test_bases_stay_orthonormal(seed: int, scale: float, tokens: int) -> None:
    bases = subspace()
    assert_orthonormal(bases)
    for step in range(4):
        for number, (rows, cols) in enumerate(SHAPES):  # gradients of low rank and unequal columns
            right = randn(3, tokens, cols, seed=seed + 2 * step) * 10.0 ** -torch.arange(cols)
            bases.accumulate(number, Factors(scale * randn(3, tokens, rows, seed=seed + 2 * step + 1), right, rows))
        bases.update([])
        assert_orthonormal(bases)


@quick
@given(seed=seeds)
def test_moving_projects_what_was_lifted(seed: int) -> None:
    bases = subspace()
    window, queue = (coordinates_of(bases, gradients_of(SHAPES, n, seed + n)) for n in (3, 2))
    lifted = [bases.lift(flat) for flat in torch.cat([window, queue])]
    before = bases.bases(0)[0]
    move(bases, gradients_of(SHAPES, 4, seed + 100), [window, queue])
    assert (bases.bases(0)[0] - before).abs().max() > 1e-3
    expected = coordinates_of(bases, [torch.stack(column) for column in zip(*lifted, strict=True)])
    torch.testing.assert_close(torch.cat([window, queue]), expected)


def test_re_expression_keeps_what_both_bases_span() -> None:
    shape = [(10, 8)]
    left, right = torch.linalg.qr(randn(10, 2, seed=0)).Q, torch.linalg.qr(randn(8, 2, seed=1)).Q
    family = left @ randn(6, 2, 2, seed=2) @ right.T
    bases = subspace(shape, rank=3)
    for _ in range(6):
        move(bases, [family])
    flat = bases.project(0, explicit(family)).clone()
    move(bases, [randn(6, 10, 8, seed=3) * 1e-3 + family], [flat])
    torch.testing.assert_close(bases.lift(flat[0])[0], family[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 50.0])  # the moments are centred: a common offset does not count
def test_bases_find_a_low_rank_family(offset: float) -> None:
    shapes = [(30, 20), (30, 20)]
    families = []
    for seed in (0, 10):
        left, right = torch.linalg.qr(randn(30, 3, seed=seed)).Q, torch.linalg.qr(randn(20, 3, seed=seed + 1)).Q
        families.append((left, right, left @ randn(12, 3, 3, seed=seed + 2) @ right.T))
    bases = subspace(shapes, rank=3)
    for _ in range(8):
        move(bases, [family + offset for *_, family in families])
    for number, (left, right, _) in enumerate(families):
        found_left, found_right = bases.bases(number)
        torch.testing.assert_close(found_left @ (found_left.T @ left), left, rtol=0, atol=1e-5)
        torch.testing.assert_close(found_right @ (found_right.T @ right), right, rtol=0, atol=1e-5)


def test_bases_converge_to_the_leading_singular_spaces() -> None:
    shape, scales = [(12, 10)], 0.3 ** torch.arange(10).double()
    left, right = torch.linalg.qr(randn(12, 10, seed=0)).Q, torch.linalg.qr(randn(10, 10, seed=1)).Q
    gradients = left @ (randn(400, 10, 10, seed=2) * scales[:, None] * scales) @ right.T
    centred = gradients - gradients.mean(0)
    bases = subspace(shape, rank=4)
    for _ in range(50):
        move(bases, [gradients])
    moments = (centred @ centred.mT).mean(0), (centred.mT @ centred).mean(0)
    for basis, moment in zip(bases.bases(0), moments, strict=True):
        leading = torch.linalg.eigh(moment).eigenvectors[:, -4:]
        torch.testing.assert_close(basis @ (basis.T @ leading), leading, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("decay", "kept"), [(0.9, True), (0.0, False)])
def test_the_past_counts_by_its_decay(decay: float, kept: bool) -> None:
    directions = torch.linalg.qr(randn(12, 4, seed=0)).Q
    earlier = torch.einsum("ni,ri->nr", randn(8, 2, seed=1), directions[:, :2])[:, None]
    later = torch.einsum("ni,ri->nr", 0.3 * randn(8, 2, seed=2), directions[:, 2:])[:, None]
    bases = subspace([(12, 12)], rank=2, decay=decay)
    for _ in range(10):
        move(bases, [earlier.mT @ torch.ones(1, 12).double()])
    move(bases, [later.mT @ torch.ones(1, 12).double()])
    left = bases.bases(0)[0]
    first = directions[:, :2]
    assert (left.T @ first).square().sum() == pytest.approx(2.0 if kept else 0.0, abs=0.2)


def test_averaged_moments_turn_with_the_bases() -> None:
    bases = subspace([(9, 7)], decay=0.6)
    estimate = torch.zeros(9, 9, dtype=torch.float64)
    for seed in range(3):
        gradients, (old, _) = randn(4, 9, 7, seed=seed), bases.bases(0)
        centred = gradients - gradients.mean(0)
        product = (centred @ centred.mT).mean(0) @ old
        estimate = 0.6 * estimate + 0.4 * product / product.norm() @ old.T
        move(bases, [gradients])
        new = bases.bases(0)[0]
        moment = new.T @ (0.5 * (estimate + estimate.T)) @ new
        torch.testing.assert_close(bases.state_dict()["0.left_moment"][0], moment)
        estimate = new @ moment @ new.T


@pytest.mark.parametrize("scales", [(1.0, 1e3, 1e-3), (1.0, 1e-12, 1.0), (1e-12, 1.0, 1e9)])
def test_the_scale_of_the_gradients_does_not_matter(scales: tuple[float, ...]) -> None:
    bases, scaled = (Subspace([(9, 7)], 3, dtype=torch.float32) for _ in range(2))
    for seed, scale in enumerate(scales):
        gradients = randn(4, 9, 7, seed=seed).float()
        move(bases, [gradients])
        move(scaled, [scale * gradients])
    for one, other in zip(bases.bases(0), scaled.bases(0), strict=True):
        torch.testing.assert_close(other @ other.T, one @ one.T, rtol=0, atol=1e-4)


def test_no_gradient_leaves_the_bases_alone() -> None:
    bases = subspace()
    move(bases, gradients_of(SHAPES, 3, seed=0))
    before = [bases.bases(number) for number in range(len(SHAPES))]
    for _ in range(3):
        move(bases, [torch.zeros(3, *shape).double() for shape in SHAPES])
    for number, (left, right) in enumerate(before):
        for old, new in zip((left, right), bases.bases(number), strict=True):
            torch.testing.assert_close(new @ (new.T @ old), old, rtol=0, atol=1e-9)
    assert_orthonormal(bases)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradients_leave_one_tensors_bases_alone(value: float) -> None:
    shapes = [(6, 5), (6, 5)]
    bases, clean = subspace(shapes), subspace(shapes)
    good = gradients_of(shapes, 4, seed=0)
    move(bases, good)
    move(clean, good)
    before = bases.bases(0)
    flat = coordinates_of(bases, gradients_of(shapes, 2, seed=9))
    stored = flat.clone()
    spoilt = gradients_of(shapes, 4, seed=5)
    move(clean, spoilt)
    spoilt[0][1, 2, 3] = value
    move(bases, spoilt, [flat])
    first = bases.segments[0].size
    for old, new, other, moved in zip(before, bases.bases(0), bases.bases(1), clean.bases(1), strict=True):
        torch.testing.assert_close(new, old)
        torch.testing.assert_close(other, moved)
    torch.testing.assert_close(flat[:, :first], stored[:, :first])
    assert flat.isfinite().all()
    move(bases, good)
    assert (bases.bases(0)[0] - before[0]).abs().max() > 1e-6
    assert_orthonormal(bases)


def test_a_tensor_without_fresh_gradients_keeps_its_span_while_others_move() -> None:
    shapes = [(6, 5), (6, 5)]
    bases = subspace(shapes, rank=2)
    move(bases, gradients_of(shapes, 4, seed=0))
    (idle, _), (busy, _) = bases.bases(0), bases.bases(1)
    flat = coordinates_of(bases, gradients_of(shapes, 1, seed=9))
    lifted = bases.lift(flat[0])
    bases.accumulate(1, explicit(randn(4, 6, 5, seed=20)))
    bases.update([flat])
    torch.testing.assert_close(bases.bases(0)[0] @ (bases.bases(0)[0].T @ idle), idle, rtol=0, atol=1e-9)
    torch.testing.assert_close(bases.lift(flat[0])[0], lifted[0], rtol=0, atol=1e-9)
    assert (bases.bases(1)[0] @ (bases.bases(1)[0].T @ busy) - busy).abs().max() > 1e-2


def test_an_update_without_gradients_changes_nothing() -> None:
    bases = subspace()
    move(bases, gradients_of(SHAPES, 3, seed=0))
    before, flat = bases.state_dict(), randn(2, bases.size, seed=1)
    stored = flat.clone()
    bases.update([flat])
    assert torch.equal(flat, stored)
    assert all(torch.equal(value, before[name]) for name, value in bases.state_dict().items())


def test_initial_bases_follow_the_seed() -> None:
    one, same, other = subspace(seed=1), subspace(seed=1), subspace(seed=2)
    assert torch.equal(one.bases(0)[0], same.bases(0)[0])
    assert not torch.equal(one.bases(0)[0], other.bases(0)[0])
    assert not torch.equal(one.bases(0)[0], one.bases(3)[0])


def test_state_is_restored() -> None:
    bases, restored = subspace(), subspace(seed=5)
    move(bases, gradients_of(SHAPES, 3, seed=0))
    state = {name: value.clone() for name, value in bases.state_dict().items()}
    restored.load_state_dict(state)
    for value in state.values():  # what was loaded is a copy
        value.zero_()
    for one in (bases, restored):
        move(one, gradients_of(SHAPES, 3, seed=1))
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in bases.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [Subspace(SHAPES, 4), Subspace([*SHAPES, (3, 3)], 3), Subspace([(6, 6), *SHAPES[1:]], 3), Subspace(SHAPES[:2], 3)],
)
def test_a_state_of_another_model_or_rank_is_refused(other: Subspace) -> None:
    bases = subspace()
    with pytest.raises(ValueError, match="another model or rank"):
        bases.load_state_dict(other.state_dict())
    assert_orthonormal(bases)


def test_the_rank_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rank"):
        Subspace(SHAPES, 0)
    with pytest.raises(ValueError, match="rank"):
        Subspace(SHAPES, [3] * 6 + [0])


def test_blocks_are_a_view_of_one_tensors_coordinates() -> None:
    bases = subspace()
    flat = coordinates_of(bases, gradients_of(SHAPES, 3, seed=0))
    for number, gradient in enumerate(gradients_of(SHAPES, 3, seed=0)):
        left, right = bases.bases(number)
        torch.testing.assert_close(bases.blocks(number, flat), left.T @ gradient @ right)
    before = flat.clone()
    bases.blocks(2, flat).zero_()
    segment = bases.segments[2]
    assert flat[:, segment.start : segment.start + segment.size].eq(0).all()
    assert (flat != before).sum() == 3 * segment.size
