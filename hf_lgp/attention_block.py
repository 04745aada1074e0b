"""One pre-norm attention block as its class token sees it.

The class token's output of a block depends on the other rows only through its own attention, and one query row needs neither
keys nor values of all rows: with ``n_t`` the normalised rows, head ``h`` scores row ``t`` by ``(W_k^T q_h) . n_t`` and its
output is ``W_v (sum_t a_t n_t)``. So forward and backward of the class row cost about one row's matrix products plus
four passes over the normalised rows, and the weight gradient of keys and of values is one outer product per head:

    dL/dW_k = q_h (x) sum_t ds_t n_t        dL/dW_v = do_h (x) sum_t a_t n_t

(up to the norm's own affine map). The other rows enter as constants; what the class row asks of them is returned as :class:`OtherRows`.
More rows than one can be followed in this way: their heads share the passes over the other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm


@dataclass(frozen=True)
class AttentionBlock:
    """The parts of a pre-norm block ``y = x + s_1 o(attention(norm_1 x))``, ``z = y + s_2 fc_2(act(fc_1(norm_2 y)))``.

    Attributes:
        module: The block itself.
        norm_before: Norm before the attention.
        query: Query projection.
        key: Key projection.
        value: Value projection.
        output: Output projection.
        norm_after: Norm before the MLP.
        expand: First MLP layer.
        activation: Its activation, a function of tensors.
        contract: Second MLP layer.
        heads: Number of heads.
        scaling: Factor of the scores.
        scales: Layer scales of attention and MLP, or None.
        dropouts: Modules that multiply the branches (dropout, stochastic depth), each called for the attention branch
            first and for the MLP branch second.
        attention_dropout: Dropout of attention weights now; the path does without it, so it is a little less accurate there.
        plain: Whether the block is called with hidden states alone.
    """

    module: nn.Module
    norm_before: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    norm_after: nn.LayerNorm
    expand: nn.Linear
    activation: Callable[[Tensor], Tensor]
    contract: nn.Linear
    heads: int
    scaling: float
    scales: tuple[Tensor, Tensor] | None = None
    dropouts: tuple[nn.Module, ...] = ()
    attention_dropout: Callable[[], float] = lambda: 0.0
    plain: bool = False

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """Norms and linear layers, as the hidden states pass them."""
        return (
            self.norm_before,
            self.query,
            self.key,
            self.value,
            self.output,
            self.norm_after,
            self.expand,
            self.contract,
        )


@dataclass(frozen=True)
class BlockRows:
    """What a block's forward leaves for the path.

    Attributes:
        entering: The rows that are followed as they enter the block, class row first, shape ``(m, S, D)``.
        others: The other rows after the norm without its affine map, shape ``(m, T - 1, D)``, in the dtype of the
            computation.
        normalised: The followed rows but the class row after the norm without its affine map, shape ``(m, S - 1, D)``: weighted
            means of the other rows. None if the class row alone is followed.
        shares: Those weights, shape ``(m, T - 1, S - 1)``, or None.
        bias: Added to the followed rows' scores, shape ``(m, S, H or 1, T)``, or None.
        branches: Factors that dropout gave the followed rows of the two branches, shape ``(m, S, D)`` each, or None.
    """

    entering: Tensor
    others: Tensor
    normalised: Tensor | None = None
    shares: Tensor | None = None
    bias: Tensor | None = None
    branches: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Asked:
    """What one kind of query asks of a block's other rows: row ``t`` receives ``sum_r mixers_{r,t} directions_r``.

    Attributes:
        mixers: Shape ``(m, R, T - 1)``.
        directions: Shape ``(m, R, D)``.
        along: Inner products of directions and normalised rows, shape ``(m, R, T - 1)``.
    """

    mixers: Tensor
    directions: Tensor
    along: Tensor


@dataclass(frozen=True)
class OtherRows:
    """Gradient of a block's other rows, after the norm without its affine map, as far as the followed rows read them.

    Row ``t`` receives ``ds_t u`` as a key and ``a_t d(pooled)`` as a value from every head of every followed row, and from a followed
    row that is a mean of other rows its share of what that mean receives.

    Attributes:
        parts: These three, or the first two.
    """

    parts: tuple[Asked, ...]

    def rows(self, normalised: Tensor, spread: Tensor) -> Tensor:
        """Gradient of the rows before the norm, row by row, shape ``(m, T - 1, D)``.

        Args:
            normalised: The normalised rows, shape ``(m, T - 1, D)``.
            spread: Reciprocal standard deviations of the rows, shape ``(m, T - 1, 1)``.
        """
        through = normalised * -self._pull(normalised, spread)
        for part in self.parts:
            centred = part.directions - part.directions.mean(-1, keepdim=True)
            through = through.baddbmm_((part.mixers * spread.to(part.mixers.dtype).mT).mT, centred)
        return through

    def totals(self, normalised: Tensor, spread: Tensor, groups: Tensor) -> Tensor:
        """Sums of :meth:`rows` over groups of rows, shape ``(m, K, D)``, without forming them.

        Args:
            normalised: The normalised rows, shape ``(m, T - 1, D)``.
            spread: Reciprocal standard deviations of the rows, shape ``(m, T - 1, 1)``.
            groups: 1 where a row belongs to a group, else 0, shape ``(m, T - 1, K)``.
        """
        spreads = groups * spread.to(groups.dtype)
        first, *rest = ((part.mixers @ spreads).mT @ part.directions for part in self.parts)
        arriving = sum(rest, first)
        pulled = (groups * self._pull(normalised, spread)).mT @ normalised
        return arriving - arriving.mean(-1, keepdim=True) - pulled

    def _pull(self, normalised: Tensor, spread: Tensor) -> Tensor:
        """How much of a row's own direction the norm takes out of what the row receives, shape ``(m, T - 1, 1)``."""
        first, *rest = ((part.mixers * part.along).sum(1) for part in self.parts)
        own = sum(rest, first)[..., None]
        return own * spread.to(own.dtype) / normalised.shape[-1]

    def sizes(self, spread: Tensor) -> Tensor:
        """A bound on the size of what each row receives, shape ``(m, T - 1, 1)``."""
        bound = torch.zeros_like(spread)
        for part in self.parts:
            lengths = torch.linalg.vector_norm(part.directions, dim=-1, dtype=spread.dtype)[..., None]
            bound = bound.baddbmm_(part.mixers.abs().to(spread.dtype).mT, lengths)
        return bound * spread


class FollowedRows:
    """Forward of a block's followed rows that keeps what their backward needs.

    Every followed row attends to the class row and to the other rows.

    Args:
        block: The block.
        rows: Its rows.
        graph: Whether a backward will follow.
    """

    def __init__(self, block: AttentionBlock, rows: BlockRows, graph: bool) -> None:
        self.block, self.rows = block, rows
        with torch.set_grad_enabled(graph):
            self._forward()

    def _forward(self) -> None:
        block, others = self.block, self.rows.others
        dtype = others.dtype
        examples, followed, width = self.rows.entering.shape
        heads = block.heads

        def weight(module: nn.Linear) -> Tensor:
            return module.weight.detach().to(dtype)

        def linear(module: nn.Linear, rows: Tensor) -> Tensor:
            return F.linear(rows, weight(module), None if module.bias is None else module.bias.detach().to(dtype))

        self.entering = self.rows.entering.detach().requires_grad_()
        own = F.layer_norm(self.entering[:, :1], (width,), eps=block.norm_before.eps).to(dtype)
        means = own.new_empty(examples, 0, width) if self.rows.normalised is None else self.rows.normalised
        self.means = means.detach().requires_grad_()
        self.normalised = torch.cat([own, self.means], dim=1)
        gain, shift = (p.detach().to(dtype) for p in (block.norm_before.weight, block.norm_before.bias))
        self.queried = torch.addcmul(shift, self.normalised, gain)
        self.query = linear(block.query, self.queried)
        by_head = (self.query * block.scaling).view(examples * followed, heads, -1)
        key, value = (weight(m).view(heads, -1, width) for m in (block.key, block.value))
        probe = torch.bmm(by_head.transpose(0, 1), key).transpose(0, 1)
        self.probe = probe.unflatten(0, (examples, followed))
        self.gained = self.probe * gain
        # The followed rows' heads side by side: one pass over the other rows for all of them.
        self.asking = self.gained.flatten(1, 2)
        self.beside = self.asking @ others.mT
        scores = torch.cat([self.gained @ own[..., None], self.beside.unflatten(1, (followed, heads))], dim=-1)
        if self.rows.bias is not None:
            scores = scores + self.rows.bias.to(dtype)
        attention = scores.softmax(-1, dtype=torch.promote_types(torch.float32, dtype)).to(dtype)
        self.attention = attention[..., 1:].flatten(1, 2)
        self.drawn = self.attention @ others
        drawn = self.drawn.unflatten(1, (followed, heads))
        self.pooled = torch.addcmul(drawn, attention[..., :1], own[:, None])
        self.attended = torch.addcmul(shift, self.pooled, gain)
        mixed = torch.bmm(self.attended.flatten(0, 1).transpose(0, 1), value.mT).transpose(0, 1)
        if block.value.bias is not None:
            mixed = mixed + block.value.bias.detach().to(dtype).view(heads, -1)
        self.mixed = mixed.unflatten(0, (examples, followed))
        self.projected = linear(block.output, self.mixed.flatten(2))
        self.middle = self.entering + self._branch(self.projected, 0)
        self.normalised_after = F.layer_norm(self.middle, (width,), eps=block.norm_after.eps).to(dtype)
        gain, shift = (p.detach().to(dtype) for p in (block.norm_after.weight, block.norm_after.bias))
        self.expanded_from = torch.addcmul(shift, self.normalised_after, gain)
        self.expanded = linear(block.expand, self.expanded_from)
        self.activated = block.activation(self.expanded)
        self.contracted = linear(block.contract, self.activated)
        self.leaving = self.middle + self._branch(self.contracted, 1)

    def _branch(self, branch: Tensor, position: int) -> Tensor:
        wide = branch.to(self.rows.entering.dtype)
        if self.block.scales is not None:
            wide = wide * self.block.scales[position].detach()
        return wide if self.rows.branches is None else wide * self.rows.branches[position]

    def backward(self, delta: Tensor) -> tuple[Tensor, dict[nn.Module | Tensor, PathTerm], OtherRows]:
        """Gradient of the followed rows entering the block, and the path's terms.

        Args:
            delta: Gradient of the followed rows leaving the block, shape ``(m, S, D)``.

        Returns:
            ``(entering, terms, others)``: the gradient of the entering rows, shape ``(m, S, D)``, but for what a mean's query receives,
            which the other rows share; a term for every module and loose parameter; the gradient that the other rows receive.
        """
        block = self.block
        wanted = [
            self.entering,
            self.means,
            self.queried,
            self.query,
            self.probe,
            self.gained,
            self.beside,
            self.attention,
            self.drawn,
            self.attended,
            self.mixed,
            self.projected,
            self.middle,
            self.expanded_from,
            self.expanded,
            self.contracted,
        ]
        (
            entering,
            means,
            queried,
            query,
            probe,
            gained,
            beside,
            attention,
            drawn,
            attended,
            mixed,
            projected,
            middle,
            expanded_from,
            expanded,
            contracted,
        ) = torch.autograd.grad(self.leaving, wanted, delta.to(self.leaving.dtype))
        by_head = self.query.detach().unflatten(2, (block.heads, -1)) * block.scaling
        gain = (queried * self.normalised).sum(1)
        gain += torch.addcmul(gained * self.probe, attended, self.pooled).sum((1, 2))
        terms: dict[nn.Module | Tensor, PathTerm] = {
            block.norm_before: _norm_term(block.norm_before, gain, queried.sum(1) + attended.sum((1, 2))),
            block.query: _row_term(block.query, query, self.queried),
            block.key: HeadsTerm(by_head, probe, block.key.bias is not None, True),
            block.value: HeadsTerm(mixed, self.attended.detach(), block.value.bias is not None, False),
            block.output: _row_term(block.output, projected, self.mixed.flatten(2)),
            block.norm_after: _norm_term(
                block.norm_after, (expanded_from * self.normalised_after).sum(1), expanded_from.sum(1)
            ),
            block.expand: _row_term(block.expand, expanded, self.expanded_from),
            block.contract: _row_term(block.contract, contracted, self.activated),
        }
        if block.scales is not None:
            for position, (scale, into, branch) in enumerate(
                zip(block.scales, (middle, delta), (self.projected, self.contracted), strict=True)
            ):
                factor = 1.0 if self.rows.branches is None else self.rows.branches[position]
                gradient = (into * branch.detach().to(into.dtype) * factor).sum(1, keepdim=True)
                terms[scale] = DenseTerm(gradient, (scale.shape,))
        parts = [
            Asked(beside, self.asking.detach(), self.beside.detach()),
            Asked(self.attention.detach(), drawn, attention),
        ]
        if self.rows.shares is not None:
            parts.append(Asked(self.rows.shares.mT, means, means @ self.rows.others.mT))
        return entering, terms, OtherRows(tuple(parts))


def _row_term(module: nn.Linear, delta: Tensor, inputs: Tensor) -> RowTerm:
    return RowTerm(delta, inputs.detach(), module.bias is not None)


def _norm_term(module: nn.LayerNorm, gain: Tensor, shift: Tensor) -> DenseTerm:
    rows = torch.stack([gain.detach(), shift], dim=1)
    return DenseTerm(rows, (module.weight.shape, module.bias.shape))
