"""One pre-norm attention block as its class token sees it.

The class token's output of a block depends on the other rows only through its own attention, and one query row needs neither
keys nor values of all rows: with ``n_t`` the normalised rows, head ``h`` scores row ``t`` by ``(W_k^T q_h) . n_t`` and its
output is ``W_v (sum_t a_t n_t)``. So forward and backward of the class row cost about one row's matrix products plus
four passes over the normalised rows, and the weight gradient of keys and of values is one outer product per head:

    dL/dW_k = q_h (x) sum_t ds_t n_t        dL/dW_v = do_h (x) sum_t a_t n_t

(up to the norm's own affine map, which is folded into the two weights). The other rows enter as constants; what the class row asks
of them is returned as :class:`~hf_lgp.other_rows.OtherRows`. More rows than one can be followed in this way: their heads share the
passes over the other rows. The backward is written out: a graph would keep, sum and copy three times as much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_block import AttentionBlock, BlockRows
from .other_rows import Asked, OtherRows
from .path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm


class FollowedRows:
    """Forward of a block's followed rows that keeps what their backward needs.

    Every followed row attends to the class row and to the other rows.

    Args:
        block: The block.
        rows: Its rows.
        graph: Whether a backward will follow.

    Attributes:
        leaving: The followed rows as they leave the block, shape ``(m, S, D)``.
    """

    def __init__(self, block: AttentionBlock, rows: BlockRows, graph: bool) -> None:
        self.block, self.rows = block, rows
        self._dtype = rows.others.dtype
        with torch.no_grad():
            self._middle = rows.entering + self._branch(self._attend(), 0)
            self.leaving = self._middle + self._branch(self._expand(graph), 1)

    # -- forward -----------------------------------------------------------------------------------------------------------

    def _attend(self) -> Tensor:
        """The attention branch, shape ``(m, S, D)`` in the dtype of the computation."""
        block, rows, dtype = self.block, self.rows, self._dtype
        others, norm = rows.others, block.norm_before
        followed, width = rows.entering.shape[1:]
        own, *self._statistics = torch.native_layer_norm(rows.entering[:, :1], (width,), None, None, norm.eps)
        self._own = own.to(dtype)
        self._normalised = self._own if rows.normalised is None else torch.cat([self._own, rows.normalised], dim=1)
        self._queried = torch.addcmul(norm.bias.to(dtype), self._normalised, norm.weight.to(dtype))
        self._query = self._linear(block.query, self._queried)
        # The followed rows' heads side by side: one pass over the other rows for all of them.
        self._key = self._by_head(block.key.weight * (norm.weight * block.scaling))
        self._asking = self._through_heads(self._query.unflatten(2, (block.heads, -1)), self._key).flatten(1, 2)
        self._beside = self._asking @ others.mT
        scores = torch.cat([self._asking @ self._own.mT, self._beside], dim=-1)
        if rows.bias is not None:
            scores = (scores.unflatten(1, (followed, block.heads)) + rows.bias.to(dtype)).flatten(1, 2)
        self._shares = scores.softmax(-1, dtype=torch.promote_types(torch.float32, dtype))
        attention = self._shares.to(dtype)
        self._to_own, self._attention = attention[..., :1], attention[..., 1:].contiguous()
        self._pooled = (self._attention @ others).addcmul_(self._to_own, self._own)
        self._value = self._by_head(block.value.weight * norm.weight)
        bias = block.value.weight @ norm.bias
        bias = bias if block.value.bias is None else bias + block.value.bias
        pooled = self._pooled.unflatten(1, (followed, block.heads))
        mixed = self._through_heads(pooled, self._value.mT, bias.to(dtype).view(block.heads, 1, -1))
        self._mixed = mixed.flatten(2)
        self._projected = self._linear(block.output, self._mixed)
        return self._projected

    def _expand(self, graph: bool) -> Tensor:
        """The MLP branch, shape ``(m, S, D)`` in the dtype of the computation."""
        block, norm, dtype = self.block, self.block.norm_after, self._dtype
        shape = self._middle.shape[-1:]
        after, *self._statistics_after = torch.native_layer_norm(self._middle, shape, None, None, norm.eps)
        self._after = after.to(dtype)
        self._expanded_from = torch.addcmul(norm.bias.to(dtype), self._after, norm.weight.to(dtype))
        self._expanded = self._linear(block.expand, self._expanded_from).requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            self._activated = block.activation(self._expanded)
        self._contracted = self._linear(block.contract, self._activated.detach())
        return self._contracted

    def _linear(self, module: nn.Linear, rows: Tensor) -> Tensor:
        bias = module.bias
        return F.linear(rows, module.weight.to(self._dtype), None if bias is None else bias.to(self._dtype))

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype).unflatten(0, (self.block.heads, -1))

    @staticmethod
    def _through_heads(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
        """``rows @ weights + bias`` head by head: shapes ``(m, S, H, a)``, ``(H, a, b)``, ``(H, 1, b)`` and ``(m, S, H, b)``."""
        by_head = rows.flatten(0, 1).transpose(0, 1)
        product = torch.bmm(by_head, weights) if bias is None else torch.baddbmm(bias, by_head, weights)
        return product.transpose(0, 1).contiguous().unflatten(0, rows.shape[:2])

    def _branch(self, branch: Tensor, position: int) -> Tensor:
        """What a branch adds to the rows; its own backward, too."""
        wide = branch.to(self.rows.entering.dtype)
        if self.block.scales is not None:
            wide = wide * self.block.scales[position]
        return wide if self.rows.branches is None else wide * self.rows.branches[position]

    # -- backward ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, delta: Tensor) -> tuple[Tensor, dict[nn.Module | Tensor, PathTerm], OtherRows]:
        """Gradient of the followed rows entering the block, and the path's terms.

        Args:
            delta: Gradient of the followed rows leaving the block, shape ``(m, S, D)``.

        Returns:
            ``(entering, terms, others)``: the gradient of the entering rows, shape ``(m, S, D)``, but for what a mean's query receives,
            which the other rows share; a term for every module and loose parameter; the gradient that the other rows receive. Where the
            gain of the norm before the attention is exactly zero, its own gradient lacks what comes through keys and values.
        """
        delta = delta.to(self.leaving.dtype)
        terms: dict[nn.Module | Tensor, PathTerm] = {}
        middle = self._into_middle(delta, terms)
        others = self._into_entering(middle, terms)
        if self.block.scales is not None:
            branches = (self._projected, middle), (self._contracted, delta)
            for position, (scale, (branch, into)) in enumerate(zip(self.block.scales, branches, strict=True)):
                factor = 1.0 if self.rows.branches is None else self.rows.branches[position]
                gradient = (into * branch.to(into.dtype) * factor).sum(1, keepdim=True)
                terms[scale] = DenseTerm(gradient, (scale.shape,))
        return self._entering, terms, others

    def _into_middle(self, delta: Tensor, terms: dict[nn.Module | Tensor, PathTerm]) -> Tensor:
        """Gradient of the rows between the branches, shape ``(m, S, D)``; notes the terms of the MLP."""
        block, norm, dtype = self.block, self.block.norm_after, self._dtype
        contracted = self._branch(delta, 1).to(dtype)
        activated = contracted @ block.contract.weight.to(dtype)
        (expanded,) = torch.autograd.grad(self._activated, self._expanded, activated)
        expanded_from = expanded @ block.expand.weight.to(dtype)
        terms[block.contract] = _row_term(block.contract, contracted, self._activated.detach())
        terms[block.expand] = _row_term(block.expand, expanded, self._expanded_from)
        terms[norm] = _norm_term(norm, _sum(expanded_from * self._after), _sum(expanded_from))
        normalised = (expanded_from * norm.weight.to(dtype)).to(delta.dtype)
        return delta + _norm_backward(normalised, self._middle, self._statistics_after)

    def _into_entering(self, middle: Tensor, terms: dict[nn.Module | Tensor, PathTerm]) -> OtherRows:
        """Gradient of the other rows, and that of the entering rows as an attribute; notes the terms of the attention."""
        block, norm, dtype = self.block, self.block.norm_before, self._dtype
        others, own = self.rows.others, self._own
        heads = (middle.shape[1], block.heads)
        projected = self._branch(middle, 0).to(dtype)
        mixed = projected @ block.output.weight.to(dtype)
        pooled = self._through_heads(mixed.unflatten(2, (block.heads, -1)), self._value).flatten(1, 2)
        attention = pooled @ others.mT
        shares = torch.cat([pooled @ own.mT, attention], dim=-1).to(self._shares.dtype)
        scores = torch.ops.aten._softmax_backward_data(shares, self._shares, -1, self._shares.dtype).to(dtype)
        from_own, beside = scores[..., :1], scores[..., 1:].contiguous()
        asking = (beside @ others).addcmul_(from_own, own)
        query = self._through_heads(asking.unflatten(1, heads), self._key.mT).flatten(2)
        queried = query @ block.query.weight.to(dtype)
        normalised = queried * norm.weight.to(dtype)
        # What the class row receives as the key and value that it is to the followed rows.
        normalised[:, :1] += self._to_own.mT @ pooled + from_own.mT @ self._asking
        self._entering = middle.clone()
        self._entering[:, :1] += _norm_backward(
            normalised[:, :1].to(middle.dtype), self.rows.entering[:, :1], self._statistics
        )
        # The gain's own gradient as it is after the gain; keys and values see their rows through it.
        through = _sum((asking * self._asking).addcmul_(pooled, self._pooled)).to(norm.weight.dtype) / norm.weight
        gain = torch.where(norm.weight == 0, 0, through) + _sum(queried * self._normalised)
        shift = _sum(queried) + _sum(mixed) @ block.value.weight.to(dtype)
        terms[norm] = _norm_term(norm, gain, shift)
        terms[block.query] = _row_term(block.query, query, self._queried)
        terms[block.key] = HeadsTerm(
            self._query.unflatten(2, (block.heads, -1)),
            asking.unflatten(1, heads),
            block.key.bias is not None,
            bias_is_zero=True,
            gain=norm.weight.detach() * block.scaling,
        )
        terms[block.value] = HeadsTerm(
            mixed.unflatten(2, (block.heads, -1)),
            self._pooled.unflatten(1, heads),
            block.value.bias is not None,
            bias_is_zero=False,
            gain=norm.weight.detach(),
            shift=norm.bias.detach(),
        )
        terms[block.output] = _row_term(block.output, projected, self._mixed)
        parts = [Asked(beside, self._asking, self._beside), Asked(self._attention, pooled, attention)]
        if self.rows.shares is not None:
            means = normalised[:, 1:]
            parts.append(Asked(self.rows.shares.mT, means, means @ others.mT))
        return OtherRows(tuple(parts))


def _sum(rows: Tensor) -> Tensor:
    """Sum over the rows of each example, shapes ``(m, R, D)`` and ``(m, D)``: a product is faster than a sum over a middle dimension."""
    return (rows.new_ones(1, rows.shape[1]) @ rows).squeeze(1)


def _norm_backward(delta: Tensor, entering: Tensor, statistics: list[Tensor]) -> Tensor:
    """Backward of a norm without affine map, from its input's mean and reciprocal standard deviation."""
    shape, wanted = entering.shape[-1:], [True, False, False]
    gradient: Tensor = torch.ops.aten.native_layer_norm_backward(
        delta, entering, shape, *statistics, None, None, wanted
    )[0]
    return gradient


def _row_term(module: nn.Linear, delta: Tensor, inputs: Tensor) -> RowTerm:
    return RowTerm(delta, inputs, module.bias is not None)


def _norm_term(module: nn.LayerNorm, gain: Tensor, shift: Tensor) -> DenseTerm:
    return DenseTerm(torch.stack([gain, shift.to(gain.dtype)], dim=1), (module.weight.shape, module.bias.shape))
