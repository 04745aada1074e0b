"""The class-token path: the gradient that reaches every tensor along the class token alone, at about one row's cost.

A classifier on the class token receives its gradient through one row. With the other rows entering each block held constant
(in the first block they are not: there the gradient goes on into the embeddings), the backward pass follows a single row per
example: :class:`ClassPath` notes what that takes while the model runs, with or without a graph, and walks the blocks
backwards once the residuals are known. In the last block this is the exact gradient; in earlier ones it leaves out what
travels through the other rows' streams.

Most of that remainder is what the class token reads from other rows in *later* blocks, handed down along the residual stream:
``d x_t^l`` is nearly the sum over later blocks ``j`` of what row ``t`` receives from the class row's attention there. Those
gradients point in nearly one direction for all rows of an example, so one row, the mean of the others weighted by what they
receive, with the sum of their gradients, stands for them all (a mean-field estimate): it is followed beside the class row
through the first two thirds of the blocks. Only the queries' gradient is left to the class row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_block import AttentionBlock, BlockRows, FollowedRows
from .path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm
from .rules import BroadcastRule, ConvRule, Rule, ScaleRule


@dataclass(frozen=True)
class Backbone:
    """A backbone whose first row is a class token that the head reads.

    Attributes:
        blocks: Its pre-norm attention blocks.
        norm: The norm between the last block and the head, or None.
        patches: The convolution that makes the patch rows, which are the last rows.
        tokens: Parameters that enter as rows of their own, in row order, class token first.
        positions: Position table, one row per row of the first block's input, or None.
        until_last: Runs the model up to the last block, ``inputs -> hidden states`` or None for inputs it does not
            know; None if the head needs more of the last block than the class row.
    """

    blocks: list[AttentionBlock]
    norm: nn.LayerNorm | None
    patches: nn.Conv2d | None
    tokens: list[nn.Parameter]
    positions: nn.Parameter | None
    until_last: Callable[[Mapping[str, Any]], Tensor | None] | None


class ClassPath:
    """Hooks on a backbone's blocks that note its rows, and the walk back along the class token.

    Args:
        backbone: The backbone.
        rules: The rules whose parameters' path gradients are wanted.
        mean_row: Whether to follow the mean of the other rows beside the class row.

    Attributes:
        finite: For which examples the last walk stayed finite, bool of shape ``(m,)`` on the device.
    """

    def __init__(self, backbone: Backbone, rules: list[Rule], mean_row: bool = True) -> None:
        self.backbone, self.rules, self.mean_row = backbone, rules, mean_row
        self._by_module = {
            rule.module: p for p, rule in enumerate(rules) if not isinstance(rule, BroadcastRule | ScaleRule)
        }
        self._by_parameter = {parameter: p for p, rule in enumerate(rules) for parameter in rule.parameters}
        self.finite = torch.ones((), dtype=torch.bool)
        self._rows: slice | None = None
        self._chosen: Tensor | slice = slice(None)
        self._total = self._examples = 0
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._fresh: set[tuple[str, int]] = set()
        self._branch_calls: dict[nn.Module, int] = {}
        self._scratch: tuple[Tensor, Tensor, Tensor] | None = None
        self._handles = []
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

    # -- noting rows -----------------------------------------------------------------------------------------------------

    def start(self, total: int) -> None:
        """Forget the last micro-batch and expect rows of ``total`` examples."""
        self._total = total
        self._fresh.clear()

    def arm(self, rows: slice, chosen: Tensor | slice = slice(None)) -> None:
        """Note the coming forward.

        Args:
            rows: Which of the ``total`` examples it holds.
            chosen: Which examples of the forward these are.
        """
        self._rows, self._chosen = rows, chosen

    def disarm(self) -> None:
        """Stop noting."""
        self._rows = None

    def close(self) -> None:
        """Remove every hook and free the buffers."""
        self.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def _keep(self, name: str, index: int, values: Tensor, dtype: torch.dtype | None = None) -> None:
        key, shape = (name, index), (self._total, *values.shape[1:])
        dtype = dtype or values.dtype
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != values.device:
            buffer = self._kept[key] = torch.empty(shape, dtype=dtype, device=values.device)
        if name == "bias" and key not in self._fresh:
            buffer.zero_()  # a forward without a mask notes none
        buffer[self._rows] = values
        self._fresh.add(key)

    def _get(self, name: str, index: int) -> Tensor | None:
        return self._kept[name, index] if (name, index) in self._fresh else None

    def _entering(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rows is not None:
            self._note(index, args[0] if args else kwargs["hidden_states"])

    @torch.no_grad()
    def _note(self, index: int, hidden: Tensor) -> None:
        self._examples = len(hidden)
        hidden = hidden.detach()[self._chosen]
        block = self.backbone.blocks[index]
        normalised, spread = self._normalise(hidden, block.norm_before.eps)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self._keep("others", index, normalised[:, 1:], compute_dtype(hidden))
        self._keep("class", index, hidden[:, 0], wide)
        self._keep("spread", index, spread[:, 1:])
        for dropout in block.dropouts:
            self._branch_calls[dropout] = 0

    def _means(self, index: int) -> bool:
        """Whether the mean row is followed through this block: late in the stack the class row leaves little over."""
        return self.mean_row and index < min(len(self.backbone.blocks) - 1, -(-2 * len(self.backbone.blocks) // 3))

    def _normalise(self, hidden: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """A norm without affine map and its reciprocal standard deviations, in scratch that the next call overwrites."""
        if hidden.dtype in (torch.float16, torch.bfloat16):  # statistics come in a dtype of the kernel's choosing
            normalised, _, spread = torch.native_layer_norm(hidden, hidden.shape[-1:], None, None, eps)
            return normalised, spread
        scratch = self._scratch
        if (
            scratch is None
            or scratch[0].shape != hidden.shape
            or scratch[0].dtype != hidden.dtype
            or scratch[0].device != hidden.device
        ):
            rows = hidden.new_empty(*hidden.shape[:-1], 1)
            scratch = self._scratch = (torch.empty_like(hidden), rows, rows.clone())
        torch.ops.aten.native_layer_norm.out(
            hidden, hidden.shape[-1:], None, None, eps, out0=scratch[0], out1=scratch[1], out2=scratch[2]
        )
        return scratch[0], scratch[2]

    def _attending(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if self._rows is None or not isinstance(mask, Tensor):
            return
        mask = mask.detach()
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        rows = mask[:, :, :1].transpose(1, 2)
        if self._means(index):
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
        if not self._means(index):
            before, after = before[:, :1], after[:, :1]
        # What an earlier dropout zeroed says nothing of this one.
        known = before != 0
        factor = torch.where(known, after / before, torch.zeros_like(after))
        mean = factor[:, 1:].sum(1, keepdim=True) / known[:, 1:].sum(1, keepdim=True).clamp(min=1)
        factor = torch.cat([factor[:, :1], mean], dim=1)[:, : 1 + self._means(index)]
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
        if self._rows is None:
            return
        rule = self.rules[self._by_module[module]] if module in self._by_module else None
        if isinstance(rule, ConvRule):
            patches = rule.patches(args[0].detach()[self._chosen])
            self._keep("patches", 0, patches, compute_dtype(patches))

    def note_last(self, hidden: Tensor) -> BlockRows:
        """Note rows that enter the last block without its being called, shape ``(b, T, D)``."""
        index = len(self.backbone.blocks) - 1
        self._note(index, hidden)
        return self._block_rows(index, self._rows)

    def note_leaving(self, row: Tensor) -> None:
        """Note the class row that leaves the last block, shape ``(b, D)``."""
        self._keep("class", len(self.backbone.blocks), row, torch.promote_types(row.dtype, torch.float32))

    def reads_class_row(self, features: Tensor) -> bool:
        """Whether the head's input of the examples just noted begins with the normalised class row; waits for the device."""
        row, norm = self._kept["class", len(self.backbone.blocks)], self.backbone.norm
        if norm is not None:
            row = F.layer_norm(row, norm.normalized_shape, norm.weight.to(row), norm.bias.to(row), norm.eps)
        return same_features(features, row)

    def _block_rows(self, index: int, rows: slice | None, weights: Tensor | None = None) -> BlockRows:
        """What was noted of one block.

        Args:
            index: The block.
            rows: Which examples; None for all.
            weights: Of the other rows in their mean, shape ``(m, T - 1, 1)``; None to follow the class row alone.
        """
        part = slice(None) if rows is None else rows
        followed, normalised = self._kept["class", index][part, None], None
        if weights is not None:
            mean, normalised = self._mean_row(index, weights)
            followed = torch.cat([followed, mean], dim=1)
        bias, branches = self._get("bias", index), (self._get("branch 0", index), self._get("branch 1", index))
        return BlockRows(
            followed,
            self._kept["others", index][part],
            normalised,
            None if bias is None else bias[part],
            None if branches[0] is None or branches[1] is None else (branches[0][part], branches[1][part]),
        )

    def _mean_row(self, index: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of the other rows that enter a block and of the same rows normalised, shape ``(m, 1, D)`` each.

        The former lacks its own mean over ``D``, which no norm feels. A mean of normalised rows is shorter than a normalised mean,
        whose attention would be sharper than that of any row.
        """
        others, spread = self._kept["others", index], self._kept["spread", index]
        weights = weights + torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(1, keepdim=True)
        means = torch.cat([weights / spread, weights], dim=2).to(others.dtype).mT @ others
        return means[:, :1].to(weights.dtype), means[:, 1:]

    # -- the walk back ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gradients(self, pullbacks: Tensor) -> list[PathTerm | None]:
        """Path gradients of all examples noted.

        Args:
            pullbacks: ``h``, gradient of every example's loss with respect to the head's input, shape ``(total, D)``; of wider
                inputs the first ``D`` columns are the class row's.

        Returns:
            One term per rule, None where the path does not reach it. An example whose way is not finite somewhere has zeros:
            a function of the example alone, so the estimate stays unbiased.
        """
        backbone = self.backbone
        width = backbone.blocks[0].norm_before.normalized_shape[0]
        delta = pullbacks[:, :width]
        terms: list[PathTerm | None] = [None] * len(self.rules)
        with torch.autocast(pullbacks.device.type, enabled=False):
            if backbone.norm is not None:
                delta, term = self._through_final_norm(backbone.norm, delta)
                self._assign(terms, {backbone.norm: term})
            # Sum of the other rows' gradients, handed down the residual stream, and their shares of it.
            elsewhere, weights = torch.zeros_like(delta), torch.zeros_like(self._kept["spread", 0])
            suspect, others = torch.zeros_like(delta[:, 0]), None
            for index in reversed(range(len(backbone.blocks))):
                means = self._means(index)
                rows = self._block_rows(index, None, weights if means else None)
                leaving = torch.stack([delta, elsewhere] if means else [delta], dim=1)
                entering, block_terms, others = FollowedRows(backbone.blocks[index], rows, graph=True).backward(leaving)
                self._assign(terms, block_terms)
                delta = entering[:, 0]
                suspect = suspect + entering[:, 1:].sum((1, 2))
                if index > 0 and self.mean_row:
                    spread = self._kept["spread", index]
                    elsewhere = elsewhere + others.total(rows.others, spread).to(elsewhere.dtype)
                    weights = weights + others.sizes(spread)
            assert others is not None
            self._embeddings(terms, delta, others.rows())
            self.finite = self.finite & suspect.isfinite()
        return [None if term is None else term.only(self.finite) for term in terms]

    def _assign(self, terms: list[PathTerm | None], found: Mapping[nn.Module | Tensor, PathTerm]) -> None:
        for owner, term in found.items():
            position = self._by_parameter.get(owner) if isinstance(owner, Tensor) else self._by_module.get(owner)
            if position is None:
                continue
            if isinstance(term, RowTerm | HeadsTerm):  # a frozen bias has no place in the rule
                term = replace(term, biased=len(self.rules[position].parameters) == 2)
            terms[position] = term

    def _through_final_norm(self, norm: nn.LayerNorm, delta: Tensor) -> tuple[Tensor, PathTerm]:
        row = self._kept["class", len(self.backbone.blocks)]
        shape = row.shape[-1:]
        normalised, _, spread = torch.native_layer_norm(row, shape, None, None, norm.eps)
        delta = delta.to(row.dtype)
        term = DenseTerm(torch.stack([delta * normalised, delta], dim=1), (norm.weight.shape, norm.bias.shape))
        return _norm_backward(delta * norm.weight, normalised, spread), term

    def _embeddings(self, terms: list[PathTerm | None], delta: Tensor, others: Tensor) -> None:
        rest = _norm_backward(others, self._kept["others", 0], self._kept["spread", 0].to(others.dtype))
        # What is not finite anywhere on an example's way is not finite at its end.
        self.finite = (delta.sum(1) + rest.sum((1, 2), dtype=delta.dtype)).isfinite()
        backbone = self.backbone
        for row, token in enumerate(backbone.tokens):
            position = self._by_parameter.get(token)
            if position is not None:
                gradient = delta[:, None] if row == 0 else rest[:, row - 1 : row]
                terms[position] = DenseTerm(gradient, (token.shape,))
        if backbone.positions is not None:
            position = self._by_parameter.get(backbone.positions)
            rows = torch.cat([delta[:, None].to(rest.dtype), rest], dim=1)
            if position is not None and rows[0].numel() == backbone.positions.numel():
                terms[position] = DenseTerm(rows, (backbone.positions.shape,))
        patches, conv = self._get("patches", 0), backbone.patches
        position = self._by_module.get(conv) if conv is not None else None
        if patches is not None and position is not None and conv is not None:
            rows = rest[:, rest.shape[1] - patches.shape[1] :]
            terms[position] = RowTerm(rows, patches.to(rows.dtype), len(self.rules[position].parameters) == 2)


def _norm_backward(delta: Tensor, normalised: Tensor, spread: Tensor) -> Tensor:
    """Backward of a norm without affine map: ``spread`` is the reciprocal standard deviation."""
    centred = delta - delta.mean(-1, keepdim=True)
    return (centred - normalised * (delta * normalised).mean(-1, keepdim=True)) * spread


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


def same_features(expected: Tensor, actual: Tensor) -> bool:
    """Whether the first columns of the head's input are ``actual`` but for rounding; waits for the device."""
    width = actual.shape[-1]
    if expected.dim() != 2 or expected.shape[-1] < width:
        return False
    difference = (expected[:, :width] - actual).float().norm()
    return bool(difference.isfinite() & (difference <= 0.05 * expected[:, :width].float().norm()))
