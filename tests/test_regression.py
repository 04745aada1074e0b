"""Kernel ridge regression against explicit primal and entrywise references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.regression import KERNELS, Kernel, KernelRidge

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**32 - 1)
kernels = st.sampled_from(KERNELS)


def examples(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features with an offset and unequal scales, and pullbacks."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64)
    pullbacks = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return features * torch.arange(1.0, width + 1) + 0.5, pullbacks


def targets(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(model: KernelRidge, features: Tensor, pullbacks: Tensor, window_targets: Tensor) -> Tensor:
    return model.weights(model.cross_kernel(features, pullbacks)) @ window_targets


@quick
@given(seed=seeds, count=st.integers(1, 12), ridge=st.sampled_from([1e-3, 0.1, 3.0]))
def test_linear_kernel_is_primal_ridge(seed: int, count: int, ridge: float) -> None:
    (a, h), (query_a, query_h), y = examples(count, 3, seed), examples(5, 3, seed + 1), targets(count, seed)

    def phi(features: Tensor, pullbacks: Tensor) -> Tensor:
        extended = [torch.cat([row, row.new_ones(1)]) for row in features]
        return torch.stack([torch.outer(e, p).flatten() for e, p in zip(extended, pullbacks, strict=True)])

    fitted = phi(a, h)
    penalty = ridge * fitted.square().sum(1).mean() * torch.eye(fitted.shape[1], dtype=torch.float64)
    expected = phi(query_a, query_h) @ torch.linalg.solve(fitted.T @ fitted + penalty, fitted.T @ y)
    model = KernelRidge("linear", ridge)
    model.fit(a, h)
    torch.testing.assert_close(predict(model, query_a, query_h, y), expected, rtol=1e-8, atol=1e-10)


@quick
@given(seed=seeds, count=st.integers(2, 10), ridge=st.sampled_from([1e-3, 0.1, 3.0]))
def test_rbf_kernel_entry_by_entry(seed: int, count: int, ridge: float) -> None:
    (a, h), (query_a, query_h), y = examples(count, 3, seed), examples(4, 3, seed + 1), targets(count, seed)

    variance = sum(float((a[:, d] - a[:, d].mean()).square().mean()) for d in range(3)) / 3

    def kernel(a_1: Tensor, h_1: Tensor, a_2: Tensor, h_2: Tensor) -> float:
        return math.exp(-float((a_1 - a_2).square().sum()) / variance / (2 * 3)) * float(h_1 @ h_2)

    def matrix(left: tuple[Tensor, Tensor]) -> Tensor:
        values = [[kernel(*pair, *other) for other in zip(a, h, strict=True)] for pair in zip(*left, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    gram, rows = matrix((a, h)), matrix((query_a, query_h))
    penalty = ridge * gram.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    expected = rows @ torch.linalg.solve(gram + penalty, y)
    model = KernelRidge("rbf", ridge)
    model.fit(a, h)
    torch.testing.assert_close(model.cross_kernel(query_a, query_h), rows, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(predict(model, query_a, query_h, y), expected, rtol=1e-8, atol=1e-10)


@quick
@given(seed=seeds, kernel=kernels, factor=st.floats(-3, 3))
def test_predictions_are_linear_in_the_pullbacks(seed: int, kernel: Kernel, factor: float) -> None:
    (a, h), (query_a, query_h), y = examples(8, 3, seed), examples(5, 3, seed + 1), targets(8, seed)
    other = query_h.flip(0)
    model = KernelRidge(kernel)
    model.fit(a, h)
    combined = predict(model, query_a, query_h + factor * other, y)
    apart = predict(model, query_a, query_h, y) + factor * predict(model, query_a, other, y)
    torch.testing.assert_close(combined, apart, rtol=1e-8, atol=1e-10)


@quick
@given(seed=seeds, kernel=kernels)
def test_a_mean_of_predictions_needs_one_row_of_weights(seed: int, kernel: Kernel) -> None:
    (a, h), (query_a, query_h), y = examples(8, 3, seed), examples(5, 3, seed + 1), targets(8, seed)
    model = KernelRidge(kernel)
    model.fit(a, h)
    rows = model.cross_kernel(query_a, query_h)
    torch.testing.assert_close(
        model.weights(rows.mean(0, keepdim=True)) @ y, predict(model, query_a, query_h, y).mean(0, keepdim=True)
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_small_ridge_reproduces_the_window(kernel: Kernel) -> None:
    (a, h), y = examples(6, 4, seed=0), targets(6, seed=0)
    model = KernelRidge(kernel, ridge=1e-10)
    model.fit(a, h)
    torch.testing.assert_close(predict(model, a, h, y), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ridge_does_not_depend_on_the_loss_scale(kernel: Kernel) -> None:
    (a, h), (query_a, query_h), y = examples(6, 3, seed=0), examples(4, 3, seed=1), targets(6, seed=0)
    model, scaled = KernelRidge(kernel, 0.3), KernelRidge(kernel, 0.3)
    model.fit(a, h)
    scaled.fit(a, 1e4 * h)
    torch.testing.assert_close(
        predict(model, query_a, query_h, y), predict(scaled, query_a, 1e4 * query_h, y), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_rbf_does_not_depend_on_the_unit_and_origin_of_the_features(scale: float) -> None:
    (a, h), (query_a, query_h) = examples(6, 3, seed=0), examples(4, 3, seed=1)
    offset = torch.tensor([-7.0, 0.0, 3.0], dtype=torch.float64)
    model, scaled = KernelRidge("rbf"), KernelRidge("rbf")
    model.fit(a, h)
    scaled.fit(a * scale + offset, h)
    torch.testing.assert_close(
        model.cross_kernel(query_a, query_h),
        scaled.cross_kernel(query_a * scale + offset, query_h),
        rtol=1e-8,
        atol=1e-10,
    )


def test_rbf_of_constant_features_leaves_them_unscaled() -> None:
    (a, h), query_h = examples(5, 3, seed=0), examples(5, 3, seed=1)[1]
    a = torch.full_like(a, 2.0)
    model = KernelRidge("rbf")
    model.fit(a, h)
    torch.testing.assert_close(model.cross_kernel(a, query_h), query_h @ h.T)
    torch.testing.assert_close(model.cross_kernel(a + 1.0, query_h), math.exp(-0.5) * query_h @ h.T)


def test_the_window_is_copied() -> None:
    (a, h), (query_a, query_h) = examples(5, 3, seed=0), examples(2, 3, seed=1)
    model = KernelRidge("linear")
    model.fit(a, h)
    before = model.cross_kernel(query_a, query_h)
    a.zero_()
    h.zero_()
    assert torch.equal(model.cross_kernel(query_a, query_h), before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ridge", [0.01, 1e-8])
def test_a_window_without_gradients_predicts_nothing(kernel: Kernel, ridge: float) -> None:
    a, h = (tensor.float() for tensor in examples(4, 3, seed=0))
    model = KernelRidge(kernel, ridge)
    model.fit(a, torch.zeros_like(h))
    assert torch.equal(predict(model, a, h, torch.ones(4, 2)), torch.zeros(4, 2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_window_that_cannot_be_factorised_gives_nan(kernel: Kernel) -> None:
    (a, h), y = examples(4, 3, seed=0), targets(4, seed=0)
    model = KernelRidge(kernel)
    model.fit(a, h.fill_(torch.nan))
    rows = torch.ones(2, 4, dtype=torch.float64)
    assert (model.weights(rows) @ y).isnan().all()


def test_predictions_before_a_fit_are_refused() -> None:
    model, (a, h) = KernelRidge(), examples(2, 3, seed=0)
    assert not model.fitted
    with pytest.raises(RuntimeError, match="fit"):
        model.cross_kernel(a, h)
    with pytest.raises(RuntimeError, match="fit"):
        model.weights(a)
    model.fit(a, h)
    assert model.fitted


def test_arguments_are_validated() -> None:
    with pytest.raises(ValueError, match="linear, rbf"):
        KernelRidge("cubic")  # type: ignore[arg-type]
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="ridge"):
            KernelRidge(ridge=ridge)


def test_older_examples_fade_from_the_kernel_entry_by_entry() -> None:
    (a, h), (query_a, query_h), y = examples(6, 3, 0), examples(4, 3, 1), targets(6, 0)
    ages = torch.tensor([5.0, 0.0, 1.0, 2.5, 0.0, 3.0], dtype=torch.float64)
    plain, fading = KernelRidge("linear", 0.1), KernelRidge("linear", 0.1)
    plain.fit(a, h)
    fading.fit(a, h, ages)
    gram = plain.cross_kernel(a, h)
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    faded = gram * torch.exp(-(ages[:, None] - ages[None, :]).abs())
    rows = plain.cross_kernel(query_a, query_h) * torch.exp(-ages)
    expected = rows @ torch.linalg.solve(faded + penalty, y)
    torch.testing.assert_close(predict(fading, query_a, query_h, y), expected, rtol=1e-10, atol=1e-12)
    fading.fit(a, h)
    assert torch.equal(predict(fading, query_a, query_h, y), predict(plain, query_a, query_h, y))
