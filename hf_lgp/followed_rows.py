"""One pre-norm attention block as its class token sees it.

The class token's output of a block depends on the other rows only through its own attention, and one query row needs neither
keys nor values of all rows: with ``n_t`` the normalised rows, head ``h`` scores row ``t`` by ``(W_k^T q_h) . n_t`` and its
output is ``W_v (sum_t a_t n_t)``. So forward and backward of the class row cost about one row's matrix products plus
four passes over the normalised rows, and the weight gradient of keys and of values is one outer product per head:

    dL/dW_k = q_h (x) sum_t ds_t n_t        dL/dW_v = do_h (x) sum_t a_t n_t

(up to the norm's own affine map, which is folded into the weights). As keys and values all rows are constants; what they are asked is
returned as :class:`~hf_lgp.asked_rows.AskedRows`, the class row's own part with it. More rows than one can be followed in this
way: their heads share the passes over the rows. The backward is written out: a graph would keep, sum and copy three times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .asked_rows import Asked, AskedRows
from .attention_block import BlockRows
from .block_weights import Affine, BlockWeights, affine
from .path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm


class FollowedRows:
    """Forward of a block's followed rows that keeps what their backward needs.

    Args:
        weights: The block's weights.
        rows: Its rows.
        graph: Whether a backward will follow.

    Attributes:
        leaving: The followed rows as they leave the block, shape ``(m, S, D)``.
    """

    def __init__(self, weights: BlockWeights, rows: BlockRows, graph: bool) -> None:
        self.weights, self.block, self.rows = weights, weights.block, rows
        self._dtype = weights.dtype
        with torch.no_grad():
            self._middle = rows.entering + self._branch(self._attend(), 0)
            self.leaving = self._middle + self._branch(self._expand(graph), 1)

    # -- forward -----------------------------------------------------------------------------------------------------------

    def _attend(self) -> Tensor:
        """The attention branch, shape ``(m, S, D)`` in the dtype of the computation."""
        rows, dtype, weights = self.rows, self._dtype, self.weights
        followed = rows.entering.shape[1]
        own = rows.rows[:, :1]
        self._normalised = own if rows.normalised is None else torch.cat([own, rows.normalised], dim=1)
        self._query = affine(self._normalised, weights.query).unflatten(2, (self.block.heads, -1))
        # The followed rows' heads side by side: one pass over the rows for all of them.
        self._asking = self._through_heads(self._query, self._by_head(weights.key)).flatten(1, 2)
        self._asked = scores = self._asking @ rows.rows.mT
        if rows.bias is not None:
            scores = (scores.unflatten(1, (followed, self.block.heads)) + rows.bias.to(dtype)).flatten(1, 2)
        self._shares = scores.softmax(-1, dtype=torch.promote_types(torch.float32, dtype))
        self._attention = self._shares.to(dtype)
        self._pooled = (self._attention @ rows.rows).unflatten(1, (followed, self.block.heads))
        values = self._by_head(weights.value).mT, weights.value[1].view(self.block.heads, 1, -1)
        self._mixed = self._through_heads(self._pooled, *values).flatten(2)
        self._projected = affine(self._mixed, weights.output)
        return self._projected

    def _expand(self, graph: bool) -> Tensor:
        """The MLP branch, shape ``(m, S, D)`` in the dtype of the computation."""
        norm, dtype = self.block.norm_after, self._dtype
        shape = self._middle.shape[-1:]
        after, *self._statistics_after = torch.native_layer_norm(self._middle, shape, None, None, norm.eps)
        self._after = after.to(dtype)
        self._expanded_from = torch.addcmul(norm.bias.to(dtype), self._after, norm.weight.to(dtype))
        self._expanded = affine(self._expanded_from, self.weights.expand).requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            self._activated = self.block.activation(self._expanded)
        self._contracted = affine(self._activated.detach(), self.weights.contract)
        return self._contracted

    def _by_head(self, layer: Affine) -> Tensor:
        return layer[0].unflatten(0, (self.block.heads, -1))

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
    def backward(self, delta: Tensor) -> tuple[Tensor, dict[nn.Module | Tensor, PathTerm], AskedRows]:
        """Gradient of the followed rows entering the block, and the path's terms.

        Args:
            delta: Gradient of the followed rows leaving the block, shape ``(m, S, D)``.

        Returns:
            ``(entering, terms, asked)``: the gradient of the entering rows, shape ``(m, S, D)``, but for what a mean's query receives,
            which its rows share, and what the class row is asked; a term for every module and loose parameter; the gradient that all
            rows receive as keys and values. Where the gain of the norm before the attention is exactly zero, gain and shift have no
            gradient.
        """
        delta = delta.to(self.leaving.dtype)
        terms: dict[nn.Module | Tensor, PathTerm] = {}
        middle = self._into_middle(delta, terms)
        asked = self._into_entering(middle, terms)
        if self.block.scales is not None:
            branches = (self._projected, middle), (self._contracted, delta)
            for position, (scale, (branch, into)) in enumerate(zip(self.block.scales, branches, strict=True)):
                factor = 1.0 if self.rows.branches is None else self.rows.branches[position]
                gradient = (into * branch.to(into.dtype) * factor).sum(1, keepdim=True)
                terms[scale] = DenseTerm(gradient, (scale.shape,))
        return self._entering, terms, asked

    def _into_middle(self, delta: Tensor, terms: dict[nn.Module | Tensor, PathTerm]) -> Tensor:
        """Gradient of the rows between the branches, shape ``(m, S, D)``; notes the terms of the MLP."""
        block, norm, dtype = self.block, self.block.norm_after, self._dtype
        contracted = self._branch(delta, 1).to(dtype)
        activated = contracted @ self.weights.contract[0]
        (expanded,) = torch.autograd.grad(self._activated, self._expanded, activated)
        expanded_from = expanded @ self.weights.expand[0]
        terms[block.contract] = _row_term(block.contract, contracted, self._activated.detach())
        terms[block.expand] = _row_term(block.expand, expanded, self._expanded_from)
        gradients = torch.stack([_sum(expanded_from * self._after), _sum(expanded_from)], dim=1)
        terms[norm] = DenseTerm(gradients, (norm.weight.shape, norm.bias.shape))
        normalised = (expanded_from * norm.weight.to(dtype)).to(delta.dtype)
        return delta + _norm_backward(normalised, self._middle, self._statistics_after)

    def _into_entering(self, middle: Tensor, terms: dict[nn.Module | Tensor, PathTerm]) -> AskedRows:
        """What is asked of all rows, and the gradient of the entering rows as an attribute; notes the terms of the attention."""
        block, norm, dtype, weights = self.block, self.block.norm_before, self._dtype, self.weights
        rows = self.rows.rows
        projected = self._branch(middle, 0).to(dtype)
        mixed = projected @ weights.output[0]
        by_head = mixed.unflatten(2, (block.heads, -1))
        pooled = self._through_heads(by_head, self._by_head(weights.value))
        directions = pooled.flatten(1, 2)
        attention = directions @ rows.mT
        scores = torch.ops.aten._softmax_backward_data(
            attention.to(self._shares.dtype), self._shares, -1, self._shares.dtype
        ).to(dtype)
        asking = (scores @ rows).unflatten(1, by_head.shape[1:3])
        query = self._through_heads(asking, self._by_head(weights.key).mT).flatten(2)
        normalised = query @ weights.query[0]
        own = self.rows.entering[:, :1]
        _, *statistics = torch.native_layer_norm(own, own.shape[-1:], None, None, norm.eps)
        self._entering = middle.clone()
        self._entering[:, :1] += _norm_backward(normalised[:, :1].to(middle.dtype), own, statistics)
        # Queries, keys and values see their rows through gain and shift.
        through = (asking.flatten(1, 2) * self._asking).addcmul_(directions, self._pooled.flatten(1, 2))
        gain = _sum(through) + _sum(normalised * self._normalised)
        shift = _sum(normalised) + _sum(mixed) @ weights.value[0]
        both = torch.stack([gain, shift], dim=1).to(norm.weight.dtype) / norm.weight
        terms[norm] = DenseTerm(torch.where(norm.weight == 0, 0, both), (norm.weight.shape, norm.bias.shape))
        gain, shift = norm.weight.detach(), norm.bias.detach()
        read = torch.addcmul(shift.to(dtype), self._normalised, gain.to(dtype))
        terms[block.query] = _row_term(block.query, query * block.scaling, read)
        terms[block.key] = HeadsTerm(self._query, asking, block.key.bias is not None, bias_is_zero=True, gain=gain)
        terms[block.value] = HeadsTerm(
            by_head, self._pooled, block.value.bias is not None, bias_is_zero=False, gain=gain, shift=shift
        )
        terms[block.output] = _row_term(block.output, projected, self._mixed)
        parts = [Asked(scores, self._asking, self._asked), Asked(self._attention, directions, attention)]
        if self.rows.shares is not None:
            means = normalised[:, 1:]
            parts.append(Asked(self.rows.shares.mT, means, means @ rows.mT))
        return AskedRows(tuple(parts))


def _sum(rows: Tensor) -> Tensor:
    """Sum over the rows of each example, shapes ``(m, R, D)`` and ``(m, D)``."""
    # A product of single precision is faster than a sum over a middle dimension.
    return rows.sum(1) if rows.dtype == torch.bfloat16 else (rows.new_ones(1, rows.shape[1]) @ rows).squeeze(1)


def _norm_backward(delta: Tensor, entering: Tensor, statistics: list[Tensor]) -> Tensor:
    """Backward of a norm without affine map, from its input's mean and reciprocal standard deviation."""
    shape, wanted = entering.shape[-1:], [True, False, False]
    gradient: Tensor = torch.ops.aten.native_layer_norm_backward(
        delta, entering, shape, *statistics, None, None, wanted
    )[0]
    return gradient


def _row_term(module: nn.Linear, delta: Tensor, inputs: Tensor) -> RowTerm:
    return RowTerm(delta, inputs, module.bias is not None)
