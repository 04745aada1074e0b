"""Attention of a few rows to all rows of a sequence, without forming the keys and values of all rows.

With ``x_t`` the rows that the key and value layers read, a query ``q`` scores row ``t`` by ``(W_k^T q) . x_t``, and the output is
``W_v sum_t p_t x_t + b_v``. So neither keys nor values are formed, and ``dL/dW_k``, ``dL/dW_v`` are one product per head: exact. A bias
of the key layer shifts all scores of a query alike and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sealed import SpliceError

aten = torch.ops.aten


class FoldedAttention(torch.autograd.Function):
    """``softmax(q W_k x^T + bias) x W_v^T + b_v``, head by head, for ``S`` rows ``q`` of each of ``m`` examples.

    Forward takes ``q (m, S, H, d)``, already scaled, ``key (H, d, D)``, ``value (H, d, D)``, ``value_bias (H, 1, d)`` or None,
    ``x (m, T, D)``, ``bias`` that broadcasts to ``(m, S, H, T)`` or None, what dropout leaves of the probabilities, ``kept (m, S, H, T)``,
    or None, and the key layer's bias or None, which changes nothing and gets zeros as its gradient (a parameter without one would be taken for unused); all of one dtype, and gives ``(m, S, H, d)``. Softmax is taken in float32 at least. What a row ``x_t`` receives as key and as value, ``sum_s ds_{s,t} (W_k^T q_s) + p_{s,t} (W_v^T do_s)``, is accumulated by two products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        key: Tensor,
        value: Tensor,
        value_bias: Tensor | None,
        x: Tensor,
        bias: Tensor | None,
        kept: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        m, s, heads, _ = q.shape
        with torch.autocast(q.device.type, enabled=False):
            turned = x.mT
            folded = _by_head(q, key).reshape(m, s * heads, -1)
            scores = folded @ turned
            if bias is not None:
                scores = (scores.view(m, s, heads, -1) + bias).view(m, s * heads, -1)
            p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(x.dtype)
            used = p if kept is None else p * kept.reshape(p.shape)
            pooled = (used @ x).view(m, s, heads, -1)
            left = None if kept is None else used.view(m, s, heads, -1)
            return _values(pooled, value, value_bias, left), folded, p, used, pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, key, value, value_bias, x, bias, kept, key_bias = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, key, value, value_bias, x, kept, *output[1:])
        ctx.key_bias = None if key_bias is None else key_bias.shape
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        q, key, value, value_bias, x, kept, folded, p, used, pooled = ctx.saved_tensors
        m, s, heads, _ = q.shape
        with torch.autocast(q.device.type, enabled=False):
            turned = x.mT
            from_values = _by_head(grad, value).view_as(folded)
            d_p, of_bias = from_values @ turned, grad
            if kept is not None:
                if value_bias is not None:
                    d_p = d_p + (grad * value_bias.transpose(0, 1)).sum(-1).view(m, s * heads, 1)
                    of_bias = grad * used.view(m, s, heads, -1).sum(-1, keepdim=True)
                d_p = d_p * kept.reshape(d_p.shape)
            d_scores = aten._softmax_backward_data(d_p, p, -1, p.dtype)
            d_folded = (d_scores @ x).view_as(pooled)
            d_x = _two_products(d_scores.mT, folded, used.mT, from_values) if ctx.needs_input_grad[4] else None
            d_bias = None
            if ctx.needs_input_grad[5]:
                d_bias = d_scores.view(m, s, heads, -1).sum_to_size(ctx.bias_shape)
            d_value_bias = None if value_bias is None else of_bias.sum((0, 1))[:, None]
            return (
                _by_head(d_folded, key.mT),
                _outer(q, d_folded) if ctx.needs_input_grad[1] else None,
                _outer(grad, pooled) if ctx.needs_input_grad[2] else None,
                d_value_bias,
                d_x,
                d_bias,
                None,
                None if ctx.key_bias is None else grad.new_zeros(ctx.key_bias),
            )


Affine = tuple[Tensor, Tensor | None]
"""Weight ``(H, d, D)`` and bias ``(H, 1, d)`` of an affine map from rows to heads."""


def attend(
    query: Tensor, x: Tensor, key: Affine | Tensor, value: Affine | Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention of a few rows to all.

    Args:
        query: Scaled, shape ``(m, H, S, d)``.
        x: Rows that keys and values are made of, shape ``(m, T, D)``.
        key: Keys ``(m, H', T, d)`` with ``H'`` a divisor of ``H``, of which each serves as many heads that follow one another; or, of ``x``, the affine map that makes them.
        value: The same for values.
        bias: What is added to scores; broadcasts to ``(m, H, S, T)``.
        dropout: Probability with which a probability becomes zero.

    Returns:
        Shape ``(m, S, H, d)``.
    """
    m, heads, s, d = query.shape
    times = heads // (key[0].shape[0] if isinstance(key, tuple) else key.shape[1])
    if times > 1:  # heads that share keys are taken for rows
        query = query.reshape(m, heads // times, times * s, d)
        if bias is not None:
            bias = bias.expand(-1, heads, s, -1).reshape(len(bias), heads // times, times * s, -1)
    out = _attend(query, x, key, value, bias, dropout)
    return out if times == 1 else out.unflatten(1, (times, s)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _attend(
    query: Tensor, x: Tensor, key: Affine | Tensor, value: Affine | Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    dtype = query.dtype
    kept = F.dropout(query.new_ones(*query.shape[:3], x.shape[1]), dropout) if dropout > 0.0 else None
    if isinstance(key, tuple) and isinstance(value, tuple):
        (k, key_bias), (v, v_bias) = ((w.to(dtype), None if b is None else b.to(dtype)) for w, b in (key, value))
        bias, kept = (None if t is None else t.transpose(1, 2) for t in (bias, kept))
        return FoldedAttention.apply(
            query.transpose(1, 2).contiguous(), k, v, v_bias, x.to(dtype), bias, kept, key_bias
        )[0]
    assert isinstance(key, Tensor)
    scores = query @ key.mT
    scores = scores if bias is None else scores + bias
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)
    p = p if kept is None else p * kept
    if isinstance(value, Tensor):
        return (p @ value).transpose(1, 2)
    weight, v_bias = value
    p = p.transpose(1, 2)
    pooled = (p.flatten(1, 2) @ x.to(dtype)).unflatten(1, p.shape[1:3])
    bias = None if v_bias is None else v_bias.to(dtype)
    return _values(pooled, weight.to(dtype), bias, None if kept is None else p)


def _values(pooled: Tensor, value: Tensor, bias: Tensor | None, left: Tensor | None) -> Tensor:
    """Values of pooled rows ``(m, S, H, D)``; the bias counts as much as dropout has left of the probabilities ``(m, S, H, T)``, if there is dropout."""
    if bias is None or left is None:
        return _by_head(pooled, value.mT, bias)
    return _by_head(pooled, value.mT) + left.sum(-1, keepdim=True) * bias.transpose(0, 1)


def _heads_first(rows: Tensor) -> Tensor:
    """``(m, S, H, a) -> (H, m S, a)``."""
    return rows.flatten(0, 1).transpose(0, 1)


def _by_head(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(m, S, H, a), (H, a, b) -> (m, S, H, b)``."""
    flat = _heads_first(rows)
    out = torch.bmm(flat, weights) if bias is None else torch.baddbmm(bias, flat, weights)
    return out.transpose(0, 1).contiguous().view(*rows.shape[:-1], -1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """``(m, S, H, a), (m, S, H, b) -> (H, a, b)``: sums of outer products."""
    return torch.bmm(_heads_first(left).mT, _heads_first(right))


def _two_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``a b + c d`` of batches; ``vmap`` knows no products that are added in place, which save a pass over memory."""
    product = torch.bmm(a, b)
    if torch._C._functorch.is_batchedtensor(product):
        return torch.baddbmm(product, c, d)
    return product.baddbmm_(c, d)


def rows_of_bias(
    masks: Sequence[Tensor], causal: bool, length: int, weights: Tensor | None, like: Tensor
) -> Tensor | None:
    """What attention masks add to the scores of a few query rows.

    A query row that stands for several gives a key the mean of what its rows' masks let through, ``log sum_t w_t exp(bias_t)``: of a key that half of them may not read, half.

    Args:
        masks: Each broadcasts to ``(m, H, T, T)`` and is boolean, True where a key may be read, or added to scores.
        causal: Whether a row reads none behind it.
        length: ``T``.
        weights: How much of each row a query row consists of, shape ``(m, T, S)``; None: the first row alone.
        like: A tensor of the result's dtype and device.

    Returns:
        Broadcastable to ``(m, H, S, T)``; None if nothing is added.

    Raises:
        SpliceError: If a mask has another form.
    """
    if not masks and not causal:
        return None
    least = torch.finfo(like.dtype).min / 2  # half, since sums with it must not leave the range
    wide = torch.promote_types(like.dtype, torch.float32)
    # By sums along the sequence, so that nothing is of size T^2; they are not deterministic on every device.
    if causal and not masks and weights is not None and not torch.are_deterministic_algorithms_enabled():
        through = weights.mT.unsqueeze(1).to(wide).flip(3).cumsum(3).flip(3)
        return through.clamp_min(1e-30).log().clamp_min(least).to(like.dtype)
    total = none = torch.zeros((), dtype=wide, device=like.device)
    if causal:
        rows = 1 if weights is None else length
        masks = (*masks, torch.ones(1, 1, rows, length, dtype=torch.bool, device=like.device).tril())
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise SpliceError("its attention has a mask of another form than `(examples, heads, rows, rows)`")
        mask = mask if weights is not None else mask[:, :, :1]
        total = total + (none.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.to(wide))
    total = total.clamp_min(torch.finfo(total.dtype).min / 2)
    if weights is not None and total.shape[2] > 1:
        top = total.amax((2, 3), keepdim=True).detach()
        with torch.autocast(like.device.type, enabled=False):  # in half precision small weights would be none
            through = weights.mT.unsqueeze(1).to(total.dtype) @ (total - top).exp()
        total = through.clamp_min(1e-30).log() + top  # whose gradient at 0 would be infinite
    return total.clamp_min(least).to(like.dtype)
