"""Folded attention against attention with keys and values, and its gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lgp.rows.attention import FoldedAttention, rows_of_bias
from hf_lgp.sealed import SpliceError

M, S, T, H, D_HEAD, WIDTH = 2, 3, 5, 2, 4, 6


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (M, S, H, D_HEAD),
        "key": (H, D_HEAD, WIDTH),
        "value": (H, D_HEAD, WIDTH),
        "value_bias": (H, 1, D_HEAD),
        "x": (M, T, WIDTH),
        "bias": (M, S, H, T),
    }
    return {n: torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def attention(
    q: Tensor, key: Tensor, value: Tensor, value_bias: Tensor | None, x: Tensor, bias: Tensor | None
) -> Tensor:
    keys = torch.einsum("mtw,hdw->mhtd", x, key)
    values = torch.einsum("mtw,hdw->mhtd", x, value) + (0 if value_bias is None else value_bias)
    mask = None if bias is None else bias.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=1.0).transpose(1, 2)


@pytest.mark.parametrize("left_out", [(), ("bias",), ("value_bias",), ("bias", "value_bias")])
def test_it_is_attention_with_the_same_gradients(left_out: tuple[str, ...]) -> None:
    given = {n: None if n in left_out else t for n, t in tensors().items()}
    found, expected = FoldedAttention.apply(*given.values())[0], attention(**given)
    torch.testing.assert_close(found, expected)
    upstream, leaves = torch.randn_like(expected), [t for t in given.values() if t is not None]
    for one, other in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck() -> None:
    kept = torch.tensor([0.0, 2.0], dtype=torch.float64)[torch.randint(0, 2, (M, S, H, T))]
    assert torch.autograd.gradcheck(lambda *t: FoldedAttention.apply(*t)[0], (*tensors().values(), kept))


def test_what_dropout_leaves_multiplies_the_probabilities() -> None:
    given = tensors()
    kept = torch.zeros(M, S, H, T, dtype=torch.float64)
    kept[..., 0] = 2.0
    out = FoldedAttention.apply(*given.values(), kept)[0]
    q, key, value, value_bias, x, bias = given.values()
    p = (torch.einsum("mshd,hdw,mtw->msht", q, key, x) + bias).softmax(-1)[..., :1]
    expected = 2.0 * p * torch.einsum("mw,hdw->mhd", x[:, 0], value)[:, None] + value_bias[:, 0]
    torch.testing.assert_close(out, expected)


def test_a_mask_for_keys_alone_holds_for_every_row() -> None:
    mask = torch.tensor([True, True, False])[None, None, None]
    bias = rows_of_bias(mask, torch.rand(1, 3, 2), torch.float32)
    assert bias is not None and bias.shape == (1, 1, 1, 3)
    assert torch.equal((torch.zeros(1, 1, 2, 3) + bias).softmax(-1)[0, 0, 0], torch.tensor([0.5, 0.5, 0.0]))


def test_a_mask_by_rows_is_averaged_as_the_rows_are() -> None:
    mask = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 0.25], [0.0, 0.75]]], dtype=torch.float64)
    bias = rows_of_bias(mask, weights, torch.float64)
    assert bias is not None
    torch.testing.assert_close(bias[:, :, 0], mask[:, :, 0])
    torch.testing.assert_close(bias[:, :, 1], 0.25 * mask[:, :, 1] + 0.75 * mask[:, :, 2])
    first = rows_of_bias(mask, None, torch.float64)
    assert first is not None and torch.equal(first, mask[:, :, :1])


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.bool), "block mask"])
def test_masks_of_another_form_are_refused(mask: Any) -> None:
    """Flash attention's tells which rows of an example are padding."""
    with pytest.raises(SpliceError, match="mask of another form"):
        rows_of_bias(mask, None, torch.float32)
