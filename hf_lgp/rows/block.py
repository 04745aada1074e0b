"""A block on a few rows: what it notes of its forward, and how it is run again on some of its rows while its attention reads all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend_folded, attend_plainly, rows_of_bias
from .groups import mean_rows
from .norms import norm_of_means, noted_norm
from .notes import BlockNotes, StreamNotes
from .parts import BlockParts, Intercept, forward_replaced

_Forward = Callable[..., Any]


@contextmanager
def noting(parts: BlockParts) -> Iterator[Callable[[], StreamNotes]]:
    """A context in which a block notes what :func:`run_rows` needs; gives a function that tells what was noted."""
    active = [(k, dropout) for k, dropout in enumerate(parts.dropouts) if dropout.training and 0.0 < dropout.p < 1.0]
    scales: dict[int, list[Tensor]] = {k: [] for k, _ in enumerate(parts.norms)}
    kept: dict[int, list[Tensor]] = {k: [] for k, _ in active}

    def norm_forward(k: int, norm: nn.LayerNorm) -> _Forward:
        def forward(rows: Tensor) -> Tensor:
            if rows.dim() != 3:
                return type(norm).forward(norm, rows)
            out, scale = noted_norm(norm, rows)
            scales[k].append(scale)
            return out

        return forward

    def dropout_forward(k: int, dropout: nn.Dropout) -> _Forward:
        def forward(rows: Tensor) -> Tensor:
            out = type(dropout).forward(dropout, rows)
            if rows.dim() == 3:
                with torch.no_grad():
                    kept[k].append((out[:, :1] != 0).to(out.dtype) / (1.0 - dropout.p))
            return out

        return forward

    replaced: list[tuple[nn.Module, _Forward]] = [(norm, norm_forward(k, norm)) for k, norm in enumerate(parts.norms)]
    replaced += [(dropout, dropout_forward(k, dropout)) for k, dropout in active]
    with forward_replaced(*replaced):
        yield lambda: StreamNotes({m: tuple(t) for m, t in scales.items()}, {m: tuple(t) for m, t in kept.items()})


class _Read(BaseException):
    """Leaves an attention module once it has made its keys and values."""


def run_rows(
    parts: BlockParts,
    notes: BlockNotes,
    x: Tensor,
    rows: Tensor,
    normal: Tensor | None,
    weights: Tensor | None,
    intercept: Intercept,
) -> Any:
    """A block's output for a few rows, its attention reading all rows.

    ``x (m, T, D)`` is what keys and values are made of, ``rows (m, S, D)`` the rows to follow, ``normal`` the same after the block's front norm, if it has one.
    ``weights (m, T, S)`` tell what they consist of; None stands for the first row alone, whose output is then the model's own. The result is what the block
    returns: rows ``(m, S, D)``, or a tuple that begins with them.
    """
    made: list[Tensor] = []  # keys and values of all rows, where they do not fold

    def attend(
        plain: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling")
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        bias = rows_of_bias(mask, weights, query.dtype)
        # The exact forward of the first row has the model's dropout; the walk its expectation, none.
        p = 0.0 if weights is not None else kwargs.get("dropout", 0.0)
        kept = F.dropout(query.new_ones(*query.shape[:3], x.shape[1]), p) if p > 0.0 else None
        if parts.key is not None and parts.value is not None:
            key_layer, value_layer = ((layer.weight, layer.bias) for layer in (parts.key, parts.value))
            return attend_folded(query, x, key_layer, value_layer, bias, kept), None
        if not made:
            made.extend((key, value))
            raise _Read
        return attend_plainly(query, made[0], made[1], bias, kept), None

    replaced: list[tuple[nn.Module, _Forward]] = [
        (d, _dropout_of_rows(d, notes.stream.kept.get(k, ()))) for k, d in enumerate(parts.dropouts)
    ]
    if parts.front is not None:
        replaced.append((parts.front, lambda _: normal))
    if weights is not None:
        replaced += [(norm, _norm_of_rows(norm, notes.stream.scales[k], weights)) for k, norm in enumerate(parts.norms)]
    if parts.key is None or parts.value is None:
        attention, of_all = parts.attention.forward, [(d, _dropout_of_all(d, weights)) for d in parts.dropouts]

        def attention_of_rows(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            with forward_replaced(*of_all), suppress(_Read):
                attention(x, *args, **kwargs)  # makes keys and values in its own way
            return attention(first, *args, **kwargs)

        replaced.append((parts.attention, attention_of_rows))
    else:  # the followed rows need no keys and values of their own
        replaced += [(layer, _unmade(layer.out_features)) for layer in (parts.key, parts.value)]
    with forward_replaced(*replaced), _without_checkpoint(parts.block), intercept(attend):
        # Its class's forward, not one that was put in its place.
        return type(parts.block).forward(parts.block, rows, *notes.args, **notes.kwargs)


def first_row_of_block(
    parts: BlockParts, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], intercept: Intercept
) -> Any:
    """A block's output for the first row of every example, exact, with a graph.

    From rows ``hidden (m, T, D)`` and the block's other arguments, what the block returns: rows ``(m, 1, D)``, or a tuple that begins with them.
    """
    x = hidden if parts.front is None else parts.front(hidden)
    normal = None if parts.front is None else x[:, :1]
    notes = BlockNotes(hidden, args, kwargs, frozenset(), StreamNotes({}, {}))
    return run_rows(parts, notes, x, hidden[:, :1], normal, None, intercept)


def _unmade(width: int) -> _Forward:
    """Values that nobody reads, without memory or a launch."""
    return lambda rows: rows.detach()[:1, :1, :1].expand(*rows.shape[:-1], width)


def _norm_of_rows(norm: nn.LayerNorm, noted: Sequence[Tensor], weights: Tensor) -> _Forward:
    scales = iter(noted)

    def forward(rows: Tensor) -> Tensor:
        if rows.dim() != 3:
            return type(norm).forward(norm, rows)
        return norm_of_means(norm, rows, mean_rows(weights, next(scales)))

    return forward


def _dropout_of_rows(dropout: nn.Dropout, noted: Sequence[Tensor]) -> _Forward:
    """The first row meets the dropout that it met in the forward; a mean of rows its expectation, none."""
    kept = iter(noted)

    def forward(rows: Tensor) -> Tensor:
        if not noted:
            return type(dropout).forward(dropout, rows)
        return rows if rows.dim() != 3 else torch.cat([rows[:, :1] * next(kept), rows[:, 1:]], 1)

    return forward


def _dropout_of_all(dropout: nn.Dropout, weights: Tensor | None) -> _Forward:
    """In front of keys and values of all rows: the model's own where the forward is exact, its expectation in the walk."""
    return (lambda rows: rows) if weights is not None else lambda rows: type(dropout).forward(dropout, rows)


@contextmanager
def _without_checkpoint(block: nn.Module) -> Iterator[None]:
    """A few rows need no activation checkpointing."""
    before = block.__dict__.get("gradient_checkpointing", False)
    if before:
        block.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        if before:
            block.__dict__["gradient_checkpointing"] = before
