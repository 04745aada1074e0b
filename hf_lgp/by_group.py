"""A block run on several groups of examples, each with a copy of its parameters: gradients come group by group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map


class _Within(nn.Module):
    """A function that reads the parameters of a block, as a module of which the block is a part."""

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.forward = block, function


def copies(block: nn.Module, groups: int) -> dict[str, Tensor]:
    """The block's trained parameters, by name, with a copy for each group, shape ``(G, ...)``: leaves that take no memory."""
    return {
        f"block.{name}": p.detach().expand(groups, *p.shape).requires_grad_()
        for name, p in block.named_parameters()
        if p.requires_grad
    }


def by_group(
    block: nn.Module,
    own: dict[str, Tensor],
    groups: int,
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    vectorized: bool,
) -> Any:
    """What a function of tensors and of a block's parameters gives for ``G`` groups of examples of equal size.

    Args:
        block: The block.
        own: Its parameters for each group, from :func:`copies`.
        groups: ``G``.
        function: From tensors of one group to tensors, all with an entry for each example; reads the block's parameters in the block.
        tensors: Of all groups, one group after the other.
        vectorized: Whether all groups are run at once, by ``torch.vmap``, which not every block allows; otherwise one after the other.
    """
    split = [t.unflatten(0, (groups, -1)) for t in tensors]
    within = _Within(block, function)

    def one(own: dict[str, Tensor], *tensors: Tensor) -> Any:
        return functional_call(within, own, tensors)

    if vectorized:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # an operation in a loop is fast enough
            out = vmap(one, randomness="different")(own, *split)
    else:
        each = [one({name: t[g] for name, t in own.items()}, *(t[g] for t in split)) for g in range(groups)]
        out = tree_map(lambda *t: torch.stack(t), *each)
    return tree_map(lambda t: t.flatten(0, 1), out)
