"""Leaves that stand for the parameters of blocks: gradients are taken of them, and given to the parameters at the end of a step's backward.

So the hooks of a parameter see its gradient once, autocast casts no weight twice, and groups of examples can have leaves of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

Leaves = Mapping[int, Tensor]
"""By the identity of a parameter, what stands for it."""


def leaves_of(blocks: Sequence[nn.Module], half: torch.dtype | None) -> dict[int, Tensor]:
    """A leaf for every trained parameter of some blocks, with its values; under autocast to ``half``, one in that type for those of linear layers."""
    trained = {id(p): p for block in blocks for p in block.parameters() if p.requires_grad}
    leaves = {key: p.detach() for key, p in trained.items()}
    if half is not None:
        linear = [m for block in blocks for m in block.modules() if type(m) is nn.Linear]
        cast = {id(p): p for m in linear for p in m.parameters(recurse=False) if p.dtype == torch.float32}
        sizes = [p.numel() for p in cast.values()]
        if cast:
            first = next(iter(cast.values()))
            pieces = torch.empty(sum(sizes), dtype=half, device=first.device).split(sizes)
            halves = [piece.view_as(p) for piece, p in zip(pieces, cast.values(), strict=True)]
            with torch.no_grad():
                torch._foreach_copy_(halves, list(cast.values()))
            leaves.update(zip(cast, halves, strict=True))
    return {key: leaf.requires_grad_(key in trained) for key, leaf in leaves.items()}


def expanded(leaves: Leaves, block: nn.Module, groups: int) -> dict[int, Tensor]:
    """Leaves of a block with a copy for each of ``G`` groups, shape ``(G, ...)``; they take no memory."""
    own = {id(p): leaves[id(p)] for p in block.parameters() if id(p) in leaves}
    return {
        key: leaf.detach().expand(groups, *leaf.shape).requires_grad_(leaf.requires_grad) for key, leaf in own.items()
    }


@contextmanager
def standing_in(block: nn.Module, leaves: Leaves) -> Iterator[None]:
    """A context in which a block has leaves where it has parameters, or buffers."""
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (own, name, held)
        for module in block.modules()
        for own in (module._parameters, module._buffers)
        for name, held in own.items()
        if held is not None and id(held) in leaves
    ]
    for own, name, held in places:
        own[name] = leaves[id(held)]
    try:
        yield
    finally:
        for own, name, held in places:
            own[name] = held


Fixed = Callable[[], str | None]
"""Tells what else a function depends on besides tensors, as a text; None if that has none."""

Run = Callable[[str, nn.Module, Leaves, Callable[..., Any], Sequence[Tensor], Fixed], Any]
"""Calls a function of tensors that finds leaves where a block has parameters: ``(kind, block, leaves, function, tensors, fixed)``."""


def run_eagerly(
    kind: str, block: nn.Module, leaves: Leaves, function: Callable[..., Any], tensors: Sequence[Tensor], fixed: Fixed
) -> Any:
    """A :data:`Run`, operation by operation."""
    with standing_in(block, leaves):
        return function(*tensors)


def by_group(
    block: nn.Module,
    leaves: Leaves,
    groups: int,
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    vectorized: bool,
) -> Any:
    """What a function of tensors and of a block's parameters gives for ``G`` groups of examples of equal size.

    Args:
        block: The block.
        leaves: What stands for its parameters, from :func:`expanded`.
        groups: ``G``.
        function: From tensors of one group to tensors, all with an entry for each example; finds the block's parameters in the block.
        tensors: Of all groups, one group after the other.
        vectorized: Whether all groups are run at once, by ``torch.vmap``, which not every block allows; otherwise one after the other.
    """
    split = [t.unflatten(0, (groups, -1)) for t in tensors]

    def one(leaves: dict[int, Tensor], *tensors: Tensor) -> Any:
        with standing_in(block, leaves):
            return function(*tensors)

    if vectorized:
        # The other kernels of CUDA keep nothing for a backward through `vmap`, whose tensors do not tell that they ask for a gradient.
        kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
        with warnings.catch_warnings(), kernels:
            warnings.filterwarnings("ignore", "There is a performance drop")  # an operation in a loop is fast enough
            out = torch.vmap(one, randomness="different")(dict(leaves), *split)
    else:
        # Unbound at once: the backward stacks them, where one of an entry would write zeros for all others.
        own, parts = {key: t.unbind() for key, t in leaves.items()}, [t.unbind() for t in split]
        each = [one({key: t[g] for key, t in own.items()}, *(t[g] for t in parts)) for g in range(groups)]
        out = tree_map(lambda *t: torch.stack(t), *each)
    return tree_map(lambda t: t.flatten(0, 1), out)
