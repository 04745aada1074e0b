"""Folded attention against attention with keys and values, and its gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lgp.rows.attention import FoldedAttention, attend, rows_of_bias
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
    expected = 2.0 * p * (torch.einsum("mw,hdw->mhd", x[:, 0], value)[:, None] + value_bias[:, 0])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("folded", ["", "value", "key and value"])
def test_keys_and_values_may_be_made_or_folded_and_shared(
    folded: str, shared: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tensors()
    q, key, value, value_bias, x, bias = (t for t in given.values() if t is not None)
    query = q.repeat_interleave(shared, 2).transpose(1, 2)
    keys, values = torch.einsum("mtw,hdw->mhtd", x, key), torch.einsum("mtw,hdw->mhtd", x, value) + value_bias
    of_key: Any = (key, None) if "key" in folded else keys
    of_value: Any = (value, value_bias) if "value" in folded else values
    mask = bias.transpose(1, 2).repeat_interleave(shared, 1)
    kept = torch.randint(0, 2, (M, H, shared * S, T)) / (1.0 - dropout) if dropout else torch.ones(M, H, shared * S, T)
    monkeypatch.setattr(F, "dropout", lambda ones, p: ones * kept)
    out = attend(query, x, of_key, of_value, mask, dropout)
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    # Of heads that share keys, each one's rows are taken for further rows.
    kept = kept.view(M, H, shared, S, T).flatten(1, 2).to(query)
    expected = ((query @ keys.mT + mask).softmax(-1) * kept) @ values
    torch.testing.assert_close(out, expected.transpose(1, 2))


LIKE = torch.zeros((), dtype=torch.float64)


def test_a_mask_for_keys_alone_holds_for_every_row() -> None:
    mask = torch.tensor([True, True, False])[None, None, None]
    bias = rows_of_bias([mask], False, 3, torch.rand(1, 3, 2), LIKE)
    assert bias is not None and bias.shape == (1, 1, 1, 3)
    assert torch.equal((torch.zeros(1, 1, 2, 3) + bias).softmax(-1)[0, 0, 0], LIKE.new_tensor([0.5, 0.5, 0.0]))


def test_a_key_counts_in_the_mean_of_what_the_rows_masks_let_through() -> None:
    mask = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 0.25], [0.0, 0.75]]], dtype=torch.float64)
    bias = rows_of_bias([mask], False, 3, weights, LIKE)
    assert bias is not None
    torch.testing.assert_close(bias[:, :, 0], mask[:, :, 0])
    torch.testing.assert_close(bias[:, :, 1].exp(), 0.25 * mask[:, :, 1].exp() + 0.75 * mask[:, :, 2].exp())
    first = rows_of_bias([mask], False, 3, None, LIKE)
    assert first is not None and torch.equal(first, mask[:, :, :1])


def test_causal_rows_read_none_behind_them_and_masks_add_up() -> None:
    weights = torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    bias = rows_of_bias([torch.full((1, 1, 3, 3), 0.7)], True, 3, weights, LIKE)
    assert bias is not None
    torch.testing.assert_close(bias.exp() / 2.0137527, LIKE.new_tensor([[[[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]]]))


def test_a_learnt_mask_has_finite_gradients_where_nothing_may_be_read() -> None:
    learnt = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = rows_of_bias([learnt], True, 3, torch.full((2, 3, 1), 1 / 3, dtype=torch.float64), LIKE)
    assert bias is not None
    (gradient,) = torch.autograd.grad(bias.softmax(-1)[..., 0].sum(), learnt)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.bool), "block mask"])
def test_masks_of_another_form_are_refused(mask: Any) -> None:
    with pytest.raises(SpliceError, match="mask of another form"):
        rows_of_bias([mask], False, 3, None, LIKE)
