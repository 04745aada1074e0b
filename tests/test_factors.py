"""Factored per-example gradients against gradients formed token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.factors import Factors

KINDS = ["dense", "index", "identity"]
every_kind = pytest.mark.parametrize(("kind", "ones"), [(kind, ones) for kind in KINDS for ones in (False, True)])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_and_gradients(
    kind: str, ones: bool, examples: int = 4, tokens: int = 6, rows: int = 3, cols: int = 5, seed: int = 0
) -> tuple[Factors, Tensor]:
    """Random factors and the gradients they stand for, shape ``(examples, rows, cols + ones)``."""
    left: Tensor | None = None
    if kind == "dense":
        left = explicit = randn(examples, tokens, rows, seed=seed)
    elif kind == "index":
        left = torch.randint(rows, (examples, tokens), generator=torch.Generator().manual_seed(seed))
        explicit = F.one_hot(left, rows).double()
    else:
        tokens, explicit = rows, torch.eye(rows, dtype=torch.float64).expand(examples, -1, -1)
    right = randn(examples, tokens, cols, seed=seed + 1)
    gradients = torch.zeros(examples, rows, cols + int(ones), dtype=torch.float64)
    for i in range(examples):
        for t in range(tokens):
            row = torch.cat([right[i, t], right.new_ones(int(ones))])
            gradients[i] += torch.outer(explicit[i, t], row)
    return Factors(left, right, rows, ones), gradients


@every_kind
def test_dense(kind: str, ones: bool) -> None:
    factors, gradients = factors_and_gradients(kind, ones)
    assert (factors.examples, factors.rows, factors.cols) == gradients.shape
    torch.testing.assert_close(factors.dense(), gradients)


@every_kind
def test_project(kind: str, ones: bool) -> None:
    factors, gradients = factors_and_gradients(kind, ones)
    left_basis, right_basis = randn(factors.rows, 2, seed=7), randn(factors.cols, 4, seed=8)
    torch.testing.assert_close(factors.project(left_basis, right_basis), left_basis.T @ gradients @ right_basis)


@every_kind
def test_moment_products(kind: str, ones: bool) -> None:
    factors, gradients = factors_and_gradients(kind, ones)
    left_basis, right_basis = randn(factors.rows, 2, seed=7), randn(factors.cols, 4, seed=8)
    centred = gradients - gradients.mean(0)
    left = sum((g @ g.T for g in centred), torch.zeros(())) / factors.examples
    right = sum((g.T @ g for g in centred), torch.zeros(())) / factors.examples
    left_product, right_product = factors.moment_products(left_basis, right_basis)
    torch.testing.assert_close(left_product, left @ left_basis)
    torch.testing.assert_close(right_product, right @ right_basis)


@every_kind
@pytest.mark.parametrize("tokens", [1, 20])
def test_sketch(kind: str, ones: bool, tokens: int) -> None:
    factors, gradients = factors_and_gradients(kind, ones, tokens=tokens)
    vectors = randn(factors.cols, 7, seed=9)
    torch.testing.assert_close(factors.sketch(vectors), gradients @ vectors)


@every_kind
def test_sketches_keep_inner_products_on_average(kind: str, ones: bool) -> None:
    (factors, gradients), (others, other_gradients) = (factors_and_gradients(kind, ones, seed=seed) for seed in (0, 9))
    other_gradients = other_gradients + gradients  # nothing to see between independent gradients
    exact = (gradients * other_gradients).sum((1, 2))
    draws = []
    for seed in range(1000):
        vectors = randn(factors.cols, 4, seed=seed) / 4**0.5
        sketch = factors.sketch(vectors)
        draws.append((sketch * (others.sketch(vectors) + sketch)).sum((1, 2)))
    estimates = torch.stack(draws)
    uncertainty = estimates.std(0) / len(draws) ** 0.5
    assert (uncertainty < 0.1 * exact.abs()).all()
    assert ((estimates.mean(0) - exact).abs() < 5 * uncertainty).all()


SUBTRACTED = [
    *(("dense", "dense", ones, True) for ones in (False, True)),
    *(("identity", "identity", ones, True) for ones in (False, True)),
    *((mine, theirs, False, False) for mine in KINDS for theirs in KINDS if mine != theirs or mine == "index"),
]


@pytest.mark.parametrize(("mine", "theirs", "ones", "possible"), SUBTRACTED)
@pytest.mark.parametrize("scale", [0.7, torch.tensor(-1.5)])
def test_minus(mine: str, theirs: str, ones: bool, possible: bool, scale: float | Tensor) -> None:
    factors, gradients = factors_and_gradients(mine, ones)
    other, other_gradients = factors_and_gradients(theirs, ones, tokens=2, seed=5)
    if not possible:
        with pytest.raises(ValueError, match="one kind"):
            factors.minus(other, scale)
        return
    difference = factors.minus(other, scale)
    assert (difference.examples, difference.rows, difference.cols) == gradients.shape
    torch.testing.assert_close(difference.dense(), gradients - scale * other_gradients)


@pytest.mark.parametrize("explicit_first", [False, True])
def test_minus_where_only_one_has_its_column_of_ones_spelled_out(explicit_first: bool) -> None:
    implicit, gradients = factors_and_gradients("dense", True)
    spelled, other_gradients = factors_and_gradients("dense", False, cols=6, seed=5)
    pairs = [(implicit, gradients), (spelled, other_gradients)]
    (one, its_gradients), (other, others) = reversed(pairs) if explicit_first else pairs
    torch.testing.assert_close(one.minus(other, 0.7).dense(), its_gradients - 0.7 * others)


def test_minus_keeps_the_dtype_of_what_it_subtracts_from() -> None:
    (wide, gradients), (other, others) = (factors_and_gradients("dense", False, seed=seed) for seed in (0, 5))
    assert other.left is not None
    half = Factors(other.left.bfloat16(), other.right.bfloat16(), other.rows)
    difference = wide.minus(half, 1.0)
    assert difference.right.dtype == torch.float64
    torch.testing.assert_close(difference.dense(), gradients - others, rtol=0.05, atol=0.1)


@every_kind
def test_take(kind: str, ones: bool) -> None:
    factors, gradients = factors_and_gradients(kind, ones)
    few = factors.take(3)
    assert few.examples == 3
    torch.testing.assert_close(few.dense(), gradients[:3])
    assert factors.take(99).examples == 4


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    ones=st.booleans(),
    examples=st.integers(1, 4),
    tokens=st.integers(1, 6),
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_size(kind: str, ones: bool, examples: int, tokens: int, rows: int, cols: int, seed: int) -> None:
    factors, gradients = factors_and_gradients(kind, ones, examples, tokens, rows, cols, seed)
    left_basis, right_basis = randn(rows, 2, seed=seed + 2), randn(factors.cols, 3, seed=seed + 3)
    centred = gradients - gradients.mean(0)
    left_product, right_product = factors.moment_products(left_basis, right_basis)
    expected_left = (centred @ centred.mT).mean(0) @ left_basis
    expected_right = (centred.mT @ centred).mean(0) @ right_basis
    torch.testing.assert_close(factors.project(left_basis, right_basis), left_basis.T @ gradients @ right_basis)
    torch.testing.assert_close(left_product, expected_left, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(right_product, expected_right, rtol=1e-7, atol=1e-10)
    vectors = randn(factors.cols, 2, seed=seed + 4)
    torch.testing.assert_close(factors.sketch(vectors), gradients @ vectors)
    torch.testing.assert_close(factors.dense(), gradients)


def test_examples_that_agree_have_no_moments() -> None:
    factors, _ = factors_and_gradients("dense", True, examples=1)
    assert factors.left is not None
    twice = Factors(factors.left.repeat(3, 1, 1), factors.right.repeat(3, 1, 1), factors.rows, True)
    assert all(
        product.abs().max() < 1e-12 for product in twice.moment_products(torch.eye(3).double(), torch.eye(6).double())
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_float16_is_widened(kind: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    factors, _ = factors_and_gradients(kind, False)
    left = factors.left.to(dtype) if kind == "dense" and factors.left is not None else factors.left
    few = Factors(left, factors.right.to(dtype), factors.rows).take(4)
    assert few.right.dtype == few.dense().dtype == kept
    assert few.left is None or kind == "index" or few.left.dtype == kept


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_have_the_dtype_of_the_bases(kind: str) -> None:
    factors, gradients = factors_and_gradients(kind, kind == "dense")
    left = factors.left.bfloat16() if kind == "dense" and factors.left is not None else factors.left
    half = Factors(left, factors.right.bfloat16(), factors.rows, factors.ones)
    left_basis, right_basis = torch.eye(3), torch.eye(factors.cols)
    coordinates = half.project(left_basis, right_basis)
    assert coordinates.dtype == torch.float32
    torch.testing.assert_close(coordinates, gradients.float(), rtol=0.05, atol=0.1)
    assert {product.dtype for product in half.moment_products(left_basis, right_basis)} == {torch.float32}
    sketch = half.sketch(right_basis)
    assert sketch.dtype == torch.float32
    torch.testing.assert_close(sketch, gradients.float(), rtol=0.05, atol=0.1)
