"""The class-token path: the gradient along the class token, and by four mean rows for all others, at the cost of a few rows.

A classifier on the class token receives its gradient through one row. With the other rows entering each block held constant
(in the first block they are not: there the gradient goes on into the embeddings), the backward pass follows a single row per
example: :mod:`~hf_lgp.row_notes` notes what that takes while the model runs, with or without a graph, and :class:`ClassPath` walks the
blocks backwards once the residuals are known. In the last block this is the exact gradient; in earlier ones it leaves out what
travels through the other rows' streams.

Most of that remainder is what the class token reads from other rows in *later* blocks. Rows of one example that look alike are
asked alike, so a few mean rows stand for all of them: the rows are divided into four groups, and each group's mean, weighted by what
its rows receive, is followed beside the class row with the sum of the group's gradients, through all blocks but the last. What
comes out of a block for the rows of a group is what their mean receives, and what attention asks of every row by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .followed_rows import FollowedRows
from .path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm
from .row_notes import Backbone, MeanRows, RowNotes
from .rules import BroadcastRule, ConvRule, Rule, ScaleRule


class ClassPath(RowNotes):
    """The walk back along the class token, from what hooks on a backbone's blocks noted of its rows.

    Args:
        backbone: The backbone.
        rules: The rules whose parameters' path gradients are wanted.
        mean_rows: Whether to follow means of the other rows beside the class row.

    Attributes:
        finite: For which examples the last walk stayed finite, bool of shape ``(m,)`` on the device.
    """

    def __init__(self, backbone: Backbone, rules: list[Rule], mean_rows: bool = True) -> None:
        self.rules = rules
        self._by_module = {
            rule.module: p for p, rule in enumerate(rules) if not isinstance(rule, BroadcastRule | ScaleRule)
        }
        self._by_parameter = {parameter: p for p, rule in enumerate(rules) for parameter in rule.parameters}
        self.finite = torch.ones((), dtype=torch.bool)
        self._patterns = torch.empty(2, 0)
        patches = None if backbone.patches is None else self._by_module.get(backbone.patches)
        patch_rule = None if patches is None else rules[patches]
        # In the last block the class row is all there is.
        with_means = len(backbone.blocks) - 1 if mean_rows else 0
        super().__init__(backbone, with_means, patch_rule.patches if isinstance(patch_rule, ConvRule) else None)

    def reads_class_row(self, features: Tensor) -> bool:
        """Whether the head's input of the examples just noted begins with the normalised class row; waits for the device."""
        row, norm = self._kept["class", len(self.backbone.blocks)], self.backbone.norm
        if norm is not None:
            row = F.layer_norm(row, norm.normalized_shape, norm.weight.to(row), norm.bias.to(row), norm.eps)
        return same_features(features, row)

    def _groups(self) -> Tensor:
        """Which row is the class row, and which of four means stands for each other row, one-hot, shape ``(m, T, 1 or 5)``.

        Two directions tell the means apart, in which rows of the same example differ: the sums of its rows with the signs of
        :func:`contrasts`. Any two do nearly as well; these need no state, and no more than two passes over the rows.
        """
        rows, patterns = self.rows(min(1, self.with_means)), self._patterns
        groups = rows.new_zeros(*rows.shape[:2], 0)
        if self.with_means > 0:
            if patterns.shape[1] != rows.shape[1] or patterns.dtype != rows.dtype or patterns.device != rows.device:
                patterns = contrasts(rows.shape[1] - 1).to(rows)
                patterns = self._patterns = F.pad(patterns - patterns.mean(1, keepdim=True), (1, 0))
            along = rows @ (patterns @ rows).mT
            first, second = (along > along[:, 1:].mean(1, keepdim=True)).unbind(-1)
            means = torch.stack([first & second, first & ~second, ~first & second, ~first & ~second], dim=-1)
            groups = means.to(rows.dtype)
            groups[:, 0] = 0
        groups = F.pad(groups, (1, 0))
        groups[:, 0, 0] = 1
        return groups

    def _means(self, index: int, weights: Tensor, groups: Tensor) -> MeanRows:
        """Means of the groups of rows that enter a block.

        They lack their own mean over ``D``, which no norm feels. A mean of normalised rows is shorter than a normalised mean,
        whose attention would be sharper than that of any row.

        Args:
            index: The block.
            weights: Of the rows, shape ``(m, T, 1)``; they need not sum to one.
            groups: Which group each row belongs to, one-hot, shape ``(m, T, K)``; the class row to none.

        Returns:
            A mean for each group; zeros for a group without rows.
        """
        rows, spread = self.rows(index), self._kept["spread", index]
        tiny = torch.finfo(weights.dtype).tiny
        shares = (weights + tiny) * groups.to(weights.dtype)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=tiny)  # a group may be empty
        count = shares.shape[2]
        means = torch.cat([shares / spread, shares], dim=2).to(rows.dtype).mT @ rows
        return MeanRows(means[:, :count].to(weights.dtype), means[:, count:], shares.to(rows.dtype))

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
            # The class row's gradient and sums of the other rows' by group, handed down, and a measure of each row's part in them.
            groups, weights = self._groups(), torch.zeros_like(self._kept["spread", 0])
            arriving, suspect = delta[:, None], torch.zeros_like(delta[:, 0])
            last = len(backbone.blocks) - 1
            for index in reversed(range(last + 1)):
                means = self._means(index, weights, groups[..., 1:]) if index < self.with_means else None
                rows, spread = self.block_rows(index, None, means), self._kept["spread", index]
                followed = FollowedRows(self.weights(index, rows.rows.dtype), rows, graph=True)
                entering, block_terms, asked = followed.backward(arriving)
                self._assign(terms, block_terms)
                suspect = suspect + entering[:, 1:].sum((1, 2))
                if index > 0:
                    arriving = asked.totals(rows.rows, spread, groups).to(entering.dtype)
                    arriving[:, : entering.shape[1]] += entering
                    weights = weights + asked.sizes(spread)
                    continue
                arriving = asked.rows(rows.rows, spread)
                if means is not None:  # a mean's way down is that of its rows
                    arriving.baddbmm_(means.shares, entering[:, 1:].to(arriving.dtype))
                arriving[:, :1] += entering[:, :1]
            self._embeddings(terms, arriving)
            self.finite = self.finite & suspect.isfinite()
            self._weights.clear()
        if self.finite.device.type == "cpu" and bool(self.finite.all()):
            return terms  # looking costs nothing there
        kept: list[PathTerm | None] = []
        while terms:  # one at a time: a term that was replaced frees its memory
            unmasked = terms.pop()
            kept.append(None if unmasked is None else unmasked.only(self.finite))
        return kept[::-1]

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

    def _embeddings(self, terms: list[PathTerm | None], arriving: Tensor) -> None:
        # What is not finite anywhere on an example's way is not finite at its end.
        self.finite = arriving.sum((1, 2), dtype=torch.promote_types(arriving.dtype, torch.float32)).isfinite()
        backbone = self.backbone
        for row, token in enumerate(backbone.tokens):
            position = self._by_parameter.get(token)
            if position is not None:
                terms[position] = DenseTerm(arriving[:, row : row + 1], (token.shape,))
        if backbone.positions is not None:
            position = self._by_parameter.get(backbone.positions)
            if position is not None and arriving[0].numel() == backbone.positions.numel():
                terms[position] = DenseTerm(arriving, (backbone.positions.shape,))
        patches, conv = self._get("patches", 0), backbone.patches
        position = self._by_module.get(conv) if conv is not None else None
        if patches is not None and position is not None and conv is not None:
            rows = arriving[:, arriving.shape[1] - patches.shape[1] :]
            terms[position] = RowTerm(rows, patches.to(rows.dtype), len(self.rules[position].parameters) == 2)


def _norm_backward(delta: Tensor, normalised: Tensor, spread: Tensor) -> Tensor:
    """Backward of a norm without affine map: ``spread`` is the reciprocal standard deviation."""
    centred = delta - delta.mean(-1, keepdim=True)
    return (centred - normalised * (delta * normalised).mean(-1, keepdim=True)) * spread


def contrasts(count: int) -> Tensor:
    """Two patterns of signs over positions, shape ``(2, count)``: first part against second, and the parts' halves."""
    position = torch.arange(count) / count
    return torch.stack([(position * turns + 0.1).sin() for turns in (2 * math.pi, 4 * math.pi)]).sign()


def same_features(expected: Tensor, actual: Tensor, exactly: bool = False) -> bool:
    """Whether the head's input begins with ``actual``; waits for the device.

    Args:
        expected: The head's input, shape ``(b, D')``.
        actual: Rows to compare its first columns with, shape ``(b, D)``.
        exactly: Whether they must be all of it, and the same but for rounding; else a twentieth of its size is tolerated.
    """
    width = actual.shape[-1]
    if expected.dim() != 2 or expected.shape[-1] < width or (exactly and expected.shape != actual.shape):
        return False
    narrow = expected.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(expected.device.type)
    tolerance = 0.05 if not exactly else 0.02 if narrow else 1e-3
    difference = (expected[:, :width] - actual).float().norm()
    return bool(difference.isfinite() & (difference <= tolerance * expected[:, :width].float().norm()))
