"""Row notes: what the class-token path needs to remember of a forward pass, with or without a graph.

Hooks on a backbone's blocks note, example by example, the normalised rows that enter each block, its class row, masks, what dropout
did, and the patches behind the embedding. Buffers are kept from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention_block import AttentionBlock, BlockRows
from .block_weights import BlockWeights


@dataclass(frozen=True)
class Backbone:
    """A backbone whose first row is a class token that the head reads.

    Attributes:
        blocks: Its pre-norm attention blocks.
        norm: The norm between the last block and the head, or None.
        patches: The convolution that makes the patch rows, which are the last rows.
        tokens: Parameters that enter as rows of their own, in row order, class token first.
        positions: Position table, one row per row of the first block's input, or None.
        embeddings: The module that makes the first block's input.
        embed: Makes the first block's input, ``inputs -> hidden states`` or None for inputs it does not know; None if the
            blocks take more than hidden states or the head more of the last block than the class row.
    """

    blocks: list[AttentionBlock]
    norm: nn.LayerNorm | None
    patches: nn.Conv2d | None
    tokens: list[nn.Parameter]
    positions: nn.Parameter | None
    embeddings: nn.Module
    embed: Callable[[Mapping[str, Any]], Tensor | None] | None


@dataclass(frozen=True)
class MeanRows:
    """Weighted means of groups of the rows behind the class row.

    Attributes:
        entering: Means of the rows as they enter a block, but for a constant along ``D``, shape ``(m, K, D)``.
        normalised: Means of the same rows after the norm without its affine map, shape ``(m, K, D)``.
        shares: Weight of every row in every mean, none of the class row, shape ``(m, T, K)``.
    """

    entering: Tensor
    normalised: Tensor
    shares: Tensor


class RowNotes:
    """Hooks that, while armed, note rows.

    Args:
        backbone: The backbone.
        with_means: Number of blocks, from the first, in which means of the other rows are followed beside the class row, so that
            masks and dropout are noted for them too.
        unfold: The patch rows behind the embedding, from the convolution's input; None if they are not wanted.
    """

    def __init__(self, backbone: Backbone, with_means: int, unfold: Callable[[Tensor], Tensor] | None) -> None:
        self.backbone, self.with_means, self._unfold = backbone, with_means, unfold
        self._rows: slice | None = None
        self._chosen: Tensor | slice = slice(None)
        self._total = self._examples = 0
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._fresh: set[tuple[str, int]] = set()
        self._branch_calls: dict[nn.Module, int] = {}
        self._weights: dict[int, BlockWeights] = {}
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks where they belong, if they are not there."""
        if self._handles:
            return
        backbone = self.backbone
        for index, block in enumerate(backbone.blocks):
            module = block.module
            self._handles.append(module.register_forward_pre_hook(partial(self._entering, index), with_kwargs=True))
            attention = getattr(module, "attention", None)
            if isinstance(attention, nn.Module):
                hook = partial(self._attending, index)
                self._handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
            for dropout in block.dropouts:
                self._handles.append(dropout.register_forward_hook(partial(self._dropped, index)))
        self._handles.append(backbone.blocks[-1].module.register_forward_hook(self._left))
        if backbone.patches is not None:
            self._handles.append(backbone.patches.register_forward_hook(self._unfolded))

    def detach(self) -> None:
        """Take the hooks off, which cost a little even when nothing is noted."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, total: int) -> None:
        """Forget the last micro-batch and expect rows of ``total`` examples."""
        self._total = total
        self._fresh.clear()
        self._weights.clear()

    def arm(self, rows: slice, chosen: Tensor | slice = slice(None)) -> None:
        """Note the coming forward.

        Args:
            rows: Which of the ``total`` examples it holds.
            chosen: Which examples of the forward these are.
        """
        self._rows, self._chosen = rows, chosen

    @property
    def armed(self) -> slice:
        """Which of the examples the coming forward holds; all of them if nothing is to be noted."""
        return slice(0, self._total) if self._rows is None else self._rows

    def disarm(self) -> None:
        """Stop noting."""
        self._rows = None

    def release(self) -> None:
        """Free the buffers; they are made anew when they are needed."""
        self.disarm()
        self._kept.clear()
        self._fresh.clear()
        self._weights.clear()
        self._scratch = None

    def close(self) -> None:
        """Remove every hook and free the buffers."""
        self.detach()
        self.release()

    def _buffer(self, name: str, index: int, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Room for the coming examples' values of shape ``(b, ..., width)``, kept from step to step."""
        key, shape = (name, index), (self._total, *like.shape[1:-1], width)
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != like.device:
            buffer = self._kept[key] = torch.empty(shape, dtype=dtype, device=like.device)
        if name == "bias" and key not in self._fresh:
            buffer.zero_()  # a forward without a mask notes none
        self._fresh.add(key)
        return buffer[self._rows]

    def _keep(self, name: str, index: int, values: Tensor, dtype: torch.dtype | None = None) -> None:
        self._buffer(name, index, values, values.shape[-1], dtype or values.dtype).copy_(values)

    def _get(self, name: str, index: int) -> Tensor | None:
        return self._kept[name, index] if (name, index) in self._fresh else None

    def _entering(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rows is not None:
            self.note(index, args[0] if args else kwargs["hidden_states"])

    @torch.no_grad()
    def note(self, index: int, hidden: Tensor) -> Tensor:
        """Note rows that enter a block; hooks call it where the block itself is called.

        Args:
            index: The block.
            hidden: The rows, shape ``(b, T, D)``.

        Returns:
            The chosen rows after the norm without its affine map, in the dtype of the path's products; not to be changed.
        """
        self._examples = len(hidden)
        hidden = hidden.detach()[self._chosen]
        block = self.backbone.blocks[index]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = self._buffer("rows", index, hidden, hidden.shape[-1], compute_dtype(hidden))
        self._normalise(hidden, block.norm_before.eps, rows, self._buffer("spread", index, hidden, 1, wide))
        self._keep("class", index, hidden[:, 0], wide)
        for dropout in block.dropouts:
            self._branch_calls[dropout] = 0
        return rows

    def _normalise(self, hidden: Tensor, eps: float, rows: Tensor, spread: Tensor) -> None:
        """A norm without affine map, shape ``(b, T, D)``, and its reciprocal standard deviations, shape ``(b, T, 1)``."""
        if hidden.dtype in (torch.float16, torch.bfloat16):  # statistics come in a dtype of the kernel's choosing
            normalised, _, deviations = torch.native_layer_norm(hidden, hidden.shape[-1:], None, None, eps)
            rows.copy_(normalised)
            spread.copy_(deviations)
            return
        scratch = self._scratch
        if (
            scratch is None
            or scratch[0].shape[1:] != hidden.shape[1:]
            or len(scratch[0]) < len(hidden)
            or scratch[0].dtype != hidden.dtype
            or scratch[0].device != hidden.device
        ):
            whole = hidden.new_empty(max(self._total, len(hidden)), *hidden.shape[1:])
            scratch = self._scratch = whole, whole.new_empty(*whole.shape[:-1], 1)
        normalised, mean = (part[: len(hidden)] for part in scratch)
        into = rows if rows.dtype == hidden.dtype else normalised
        torch.ops.aten.native_layer_norm.out(
            hidden, hidden.shape[-1:], None, None, eps, out0=into, out1=mean, out2=spread
        )
        if into is not rows:
            rows.copy_(into)

    def weights(self, index: int, dtype: torch.dtype) -> BlockWeights:
        """A block's weights for products in a dtype, made once for the prediction pass and the walk back."""
        found = self._weights.get(index)
        if found is None or found.dtype != dtype:
            found = self._weights[index] = BlockWeights(self.backbone.blocks[index], dtype)
        return found

    def _attending(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if self._rows is None or not isinstance(mask, Tensor) or mask.dim() != 4:
            return
        mask = mask.detach()
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        rows = mask[:, :, :1].transpose(1, 2)
        if index < self.with_means:
            mean = (mask if mask.shape[2] == 1 else mask[:, :, 1:]).mean(2)[:, None]
            # Rows that share no key have no mean attention; a row that sees everything stands for them as well as any.
            some = mean.amax(-1, keepdim=True) > -torch.inf
            rows = torch.cat([rows, torch.where(some, mean, torch.zeros_like(mean))], dim=1)
        self._keep("bias", index, rows.expand(self._examples, *rows.shape[1:])[self._chosen])

    @torch.no_grad()
    def _dropped(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._rows is None or not is_active(module):
            return
        call = self._branch_calls.get(module, 0)
        self._branch_calls[module] = call + 1
        before, after = args[0].detach()[self._chosen], output.detach()[self._chosen]
        if index >= self.with_means:
            before, after = before[:, :1], after[:, :1]
        # A zero tells nothing: an earlier dropout keeps its factor of zero, else one is the expectation.
        known = before != 0
        factors = torch.where(known, after / before, torch.ones_like(after))
        factor = factors[:, :1]
        if index < self.with_means:
            seen = known[:, 1:].sum(1, keepdim=True)
            mean = (factors * known)[:, 1:].sum(1, keepdim=True) / seen.clamp(min=1)
            factor = torch.cat([factor, torch.where(seen > 0, mean, torch.ones_like(mean))], dim=1)
        earlier = self._get(f"branch {call}", index)
        first = module is next(d for d in self.backbone.blocks[index].dropouts if is_active(d))
        wide = torch.promote_types(factor.dtype, torch.float32)
        self._keep(f"branch {call}", index, factor if first or earlier is None else factor * earlier[self._rows], wide)

    def _left(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._rows is not None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.note_leaving(hidden.detach()[self._chosen][:, 0])

    @torch.no_grad()
    def _unfolded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._rows is None or self._unfold is None:
            return
        patches = self._unfold(args[0].detach()[self._chosen])
        self._keep("patches", 0, patches, compute_dtype(patches))

    def rows(self, index: int) -> Tensor:
        """The normalised rows that entered a block, class row first, shape ``(m, T, D)``."""
        return self._kept["rows", index]

    def note_leaving(self, row: Tensor) -> None:
        """Note the class row that leaves the last block, shape ``(b, D)``."""
        self._keep("class", len(self.backbone.blocks), row, torch.promote_types(row.dtype, torch.float32))

    def block_rows(self, index: int, rows: slice | None, means: MeanRows | None = None) -> BlockRows:
        """What was noted of one block.

        Args:
            index: The block.
            rows: Which examples; None for all.
            means: Means of the other rows of these examples, to follow beside the class row.

        Returns:
            Those rows, with what masks and dropout did to each of them.
        """
        part = slice(None) if rows is None else rows
        followed = self._kept["class", index][part, None]
        count = 0
        if means is not None:
            followed, count = torch.cat([followed, means.entering], dim=1), means.entering.shape[1]

        def of_each(name: str) -> Tensor | None:
            """What was noted of the class row and of the other rows' mean, for every followed row."""
            noted = self._get(name, index)
            if noted is None:
                return None
            noted = noted[part]
            return torch.cat([noted[:, :1], noted[:, 1:].expand(-1, count, *noted.shape[2:])], dim=1)

        branches = of_each("branch 0"), of_each("branch 1")
        return BlockRows(
            followed,
            self.rows(index)[part],
            None if means is None else means.normalised,
            None if means is None else means.shares,
            of_each("bias"),
            None if branches[0] is None or branches[1] is None else (branches[0], branches[1]),
        )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the path's products: autocast's bfloat16, else the hidden states', half precision widened."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def is_active(dropout: nn.Module) -> bool:
    """Whether a dropout or stochastic-depth module changes anything now."""
    rate = getattr(dropout, "p", getattr(dropout, "drop_prob", 0.0))
    return dropout.training and bool(rate)
