"""A pre-norm attention block: its parts, and what a forward leaves of its rows for the class-token path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


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
        rows: All rows after the norm without its affine map, class row first, shape ``(m, T, D)``, in the dtype of the computation.
        normalised: The followed rows but the class row after the norm without its affine map, shape ``(m, S - 1, D)``: weighted
            means of the other rows. None if the class row alone is followed.
        shares: Those weights, shape ``(m, T, S - 1)``, or None.
        bias: Added to the followed rows' scores, shape ``(m, S, H or 1, T)``, or None.
        branches: Factors that dropout gave the followed rows of the two branches, shape ``(m, S, D)`` each, or None.
    """

    entering: Tensor
    rows: Tensor
    normalised: Tensor | None = None
    shares: Tensor | None = None
    bias: Tensor | None = None
    branches: tuple[Tensor, Tensor] | None = None
