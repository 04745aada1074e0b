"""Norms at the scale of the rows that a mean stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lgp.rows.norms import norm_of_means, noted_norm


def norm_and_rows(affine: bool = True) -> tuple[nn.LayerNorm, torch.Tensor]:
    norm = nn.LayerNorm(6, elementwise_affine=affine, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm, torch.randn(2, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
def test_a_row_by_itself_is_normed_as_ever(affine: bool) -> None:
    norm, rows = norm_and_rows(affine)
    out, scale = noted_norm(norm, rows)
    torch.testing.assert_close(out, norm(rows))
    torch.testing.assert_close(norm_of_means(norm, rows, scale), norm(rows))


def test_the_mean_of_rows_gets_the_mean_of_their_scales() -> None:
    norm, rows = norm_and_rows()
    _, scale = noted_norm(norm, rows)
    mean = rows.mean(1, keepdim=True)
    expected = (mean - mean.mean(-1, keepdim=True)) * scale.mean(1, keepdim=True) * norm.weight + norm.bias
    torch.testing.assert_close(norm_of_means(norm, mean, scale.mean(1, keepdim=True)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_is_the_models_own_and_the_scale_float32(dtype: torch.dtype) -> None:
    norm, rows = nn.LayerNorm(6), torch.randn(2, 5, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, scale = noted_norm(norm, rows)
        assert torch.equal(out, norm(rows)) and out.dtype == norm(rows).dtype
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, (rows.float().var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt())
