"""Norms at the scale of the rows that a mean stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_lgp.rows.norms import Norm, norm_of, norm_of_means, noted_norm


class OwnLayerNorm(nn.Module):
    """A layer norm that is none of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)), 1e-6

    def forward(self, rows: Tensor) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class PlusOne(nn.LayerNorm):
    """A layer norm whose weight is stored without the one that it is near to."""

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.layer_norm(rows, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


NORMS = {
    "layer norm, plus one": lambda: PlusOne(6),
    "layer norm": lambda: nn.LayerNorm(6),
    "without weights": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "own layer norm": OwnLayerNorm,
    "rms": lambda: nn.RMSNorm(6, eps=1e-6),
    "llama": lambda: LlamaRMSNorm(6),
    "t5": lambda: T5LayerNorm(6),
}


def norm_and_rows(name: str) -> tuple[Norm, Tensor]:
    torch.manual_seed(0)
    module: Any = NORMS[name]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    rows = torch.randn(2, 5, 6, dtype=torch.float64)
    found = norm_of(module, rows)
    assert found is not None and found.centred == ("layer norm" in name or "without" in name)
    return found, rows


@pytest.mark.parametrize("name", NORMS)
def test_a_row_by_itself_is_normed_as_ever(name: str) -> None:
    norm, rows = norm_and_rows(name)
    out, scale = noted_norm(norm, rows)
    torch.testing.assert_close(out, norm.module(rows))
    torch.testing.assert_close(norm_of_means(norm, rows, scale), norm.module(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_the_mean_of_rows_gets_the_mean_of_their_scales(name: str) -> None:
    norm, rows = norm_and_rows(name)
    _, scale = noted_norm(norm, rows)
    mean, of_means = rows.mean(1, keepdim=True), scale.mean(1, keepdim=True)
    centred = mean - mean.mean(-1, keepdim=True) if norm.centred else mean
    weight, bias = (getattr(norm.module, n, None) for n in ("weight", "bias"))
    weight = weight + 1.0 if "plus one" in name else weight
    expected = centred * of_means * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
    torch.testing.assert_close(norm_of_means(norm, mean, of_means), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Linear(6, 6), nn.GELU(), nn.Sequential(nn.LayerNorm(6)), nn.ReLU()]
)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    assert norm_of(module, torch.randn(2, 5, 6)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_is_the_models_own_and_the_scale_float32(dtype: torch.dtype) -> None:
    module, rows = nn.LayerNorm(6), torch.randn(2, 5, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, scale = noted_norm(Norm(module, True), rows)
        assert torch.equal(out, module(rows)) and out.dtype == module(rows).dtype
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, (rows.float().var(-1, unbiased=False, keepdim=True) + module.eps).rsqrt())
