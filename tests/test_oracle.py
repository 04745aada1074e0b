"""The oracles against one backward pass per example and against the regression they explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyImages, tiny_vit
from torch import Tensor, nn

from hf_lgp.oracle import DensePredictor, per_example_gradients
from hf_lgp.regression import KernelRidge

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap: an oracle may be slow


def model_loss(call: Callable[..., Any], example: dict[str, Tensor]) -> Tensor:
    loss: Tensor = call(**example).loss
    return loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_a_vit_are_those_of_single_backwards(attention: str) -> None:
    model, batch = tiny_vit(attn_implementation=attention), TinyImages(4).batch(0, 4)
    gradients = per_example_gradients(model, model_loss, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert gradients.keys() == set(names)
    for i in range(4):
        loss = model(**{name: value[i : i + 1] for name, value in batch.items()}).loss
        for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(gradients[name][i], expected, rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in parameters)


def test_their_mean_is_the_gradient_of_the_batch() -> None:
    model, batch = tiny_vit(), TinyImages(5).batch(0, 5)
    gradients = per_example_gradients(model, model_loss, batch)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name].mean(0), parameter.grad, rtol=1e-8, atol=1e-12)


def test_gradients_of_any_module_and_loss_without_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    inputs = {"x": torch.randn(5, 3).double(), "y": torch.randn(5, 2).double()}

    def loss(call: Callable[..., Tensor], example: dict[str, Tensor]) -> Tensor:
        assert example["x"].shape == (1, 3)
        return F.mse_loss(call(example["x"]), example["y"], reduction="sum")

    gradients = per_example_gradients(model, loss, inputs)
    assert gradients.keys() == {"0.weight", "2.weight", "2.bias"}
    residuals = 2 * (model(inputs["x"]) - inputs["y"])
    torch.testing.assert_close(gradients["2.bias"], residuals)
    torch.testing.assert_close(gradients["2.weight"], residuals[:, :, None] * model[:2](inputs["x"])[:, None, :])


def window(count: int, seed: int, width: int = 3, size: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Features, pullbacks and gradients that depend on them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    a, h, noise, *maps = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((count, width), (count, width), (count, size), (width, width, size), (width, size))
    )
    exact = torch.einsum("ni,nj,ijp->np", a, h, maps[0]) + h @ maps[1]
    return a, h, exact + 0.1 * noise


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 20), ridge=st.sampled_from([1e-3, 0.01, 1.0]))
def test_the_full_basis_is_kernel_ridge_with_the_linear_kernel(seed: int, count: int, ridge: float) -> None:
    (a, h, g), (query_a, query_h, _) = window(count, seed), window(4, seed + 1)
    dense, kernel = DensePredictor(ridge=ridge), KernelRidge("linear", ridge)
    dense.fit(a, h, g)
    kernel.fit(a, h)
    expected = kernel.weights(kernel.cross_kernel(query_a, query_h)) @ g
    difference = dense.predict(query_a, query_h) - expected
    assert expected.norm() > 0 and difference.norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("rank", [1, 4])
def test_a_low_rank_basis_projects_on_the_leading_gradients(rank: int) -> None:
    (a, h, g), (query_a, query_h, _) = window(15, seed=0), window(4, seed=1)
    full, low = DensePredictor(), DensePredictor(rank)
    full.fit(a, h, g)
    low.fit(a, h, g)
    assert low.basis is not None and low.coefficients is not None
    assert low.basis.shape == (11, rank) and low.coefficients.shape == (rank, 12)
    torch.testing.assert_close(low.basis.T @ low.basis, torch.eye(rank).double())
    kept = (g @ low.basis).square().sum()
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(g.T @ g)[-rank:].sum())
    projected = full.predict(query_a, query_h) @ low.basis @ low.basis.T
    torch.testing.assert_close(low.predict(query_a, query_h), projected)


def test_a_linear_family_is_learnt() -> None:
    a, h, _ = window(40, seed=0)
    maps = torch.randn(4, 3, 11).double()

    def family(features: Tensor, pullbacks: Tensor) -> Tensor:
        return torch.einsum("ni,nj,ijp->np", features, pullbacks, maps[:3]) + pullbacks @ maps[3]

    dense = DensePredictor(ridge=1e-10)
    dense.fit(a, h, family(a, h))
    query_a, query_h, _ = window(4, seed=1)
    torch.testing.assert_close(dense.predict(query_a, query_h), family(query_a, query_h), rtol=1e-5, atol=1e-6)


def test_predictions_before_a_fit_are_refused() -> None:
    a, h, _ = window(2, seed=0)
    with pytest.raises(RuntimeError, match="fit"):
        DensePredictor().predict(a, h)
