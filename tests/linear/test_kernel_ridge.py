"""Kernel ridge regression in its dual form."""

import pytest
import torch

from hf_lgp.linear.kernel_ridge import fit, predict

EACH = torch.eye(4, dtype=torch.float64)


def _data(n: int):
    return [torch.randn(n, size, dtype=torch.float64) for size in (3, 3, 5)]


def test_linear_kernel_is_primal_ridge():
    a, h, targets = _data(20)
    b, g, _ = _data(4)

    def phi(a, h):
        return torch.einsum("ni,nj->nij", torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1), h).flatten(1)

    x = phi(a, h)
    penalty = 0.1 * x.square().sum(1).mean()
    primal = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
    torch.testing.assert_close(predict("linear", fit("linear", 0.1, a, h, targets), b, g, EACH), phi(b, g) @ primal)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_weighted_sum_and_linearity_in_h(kernel):
    fitted = fit(kernel, 0.1, *_data(20))
    b, g, _ = _data(4)
    weights = torch.randn(4, dtype=torch.float64)
    each = predict(kernel, fitted, b, g, EACH)
    torch.testing.assert_close(predict(kernel, fitted, b, g, weights), weights @ each)
    torch.testing.assert_close(predict(kernel, fitted, b, 3 * g, EACH), 3 * each)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_small_ridge_interpolates(kernel):
    a, h, targets = _data(4)
    torch.testing.assert_close(
        predict(kernel, fit(kernel, 1e-10, a, h, targets), a, h, EACH), targets, rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_factorised_predicts_zeros():
    a, h, targets = _data(6)
    a[0, 0] = torch.nan
    fitted = fit("linear", 0.1, a, h, targets)
    assert not fitted.dual.any()
