"""A block on a few rows: what it notes of its forward, and how it is run again on some of its rows while its attention reads all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, rows_of_bias
from .groups import mean_rows
from .norms import Norm, norm_of_means, noted_norm
from .notes import BlockNotes, StreamNotes, map_tensors
from .parts import BlockParts, Intercept, forward_replaced

_Forward = Callable[..., Any]


@contextmanager
def noting(parts: BlockParts) -> Iterator[Callable[[], StreamNotes]]:
    """A context in which a block notes what :func:`run_rows` needs; gives a function that tells what was noted."""
    active = [(k, dropout) for k, dropout in enumerate(parts.dropouts) if dropout.training and 0.0 < dropout.p < 1.0]
    scales: dict[int, list[Tensor]] = {k: [] for k, _ in enumerate(parts.norms)}
    kept: dict[int, list[Tensor]] = {k: [] for k, _ in active}

    def norm_forward(k: int, norm: Norm) -> _Forward:
        def forward(rows: Tensor) -> Tensor:
            if rows.dim() != 3:
                return type(norm.module).forward(norm.module, rows)
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

    replaced: list[tuple[nn.Module, _Forward]] = [(n.module, norm_forward(k, n)) for k, n in enumerate(parts.norms)]
    replaced += [(dropout, dropout_forward(k, dropout)) for k, dropout in active]
    with forward_replaced(*replaced):
        yield lambda: StreamNotes({m: tuple(t) for m, t in scales.items()}, {m: tuple(t) for m, t in kept.items()})


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

    Where layers make keys and values that are affine in ``x``, these are never formed. Elsewhere the attention module itself runs on all rows up to its attention, and on the few behind that: it
    may rotate, norm or cut its queries and keys as it likes.

    Args:
        parts: The block.
        notes: What it noted of its forward.
        x: What keys and values are made of, shape ``(m, T, D)``.
        rows: The rows to follow, shape ``(m, S, D)``.
        normal: The same after the block's front norm, if it has one.
        weights: What they consist of, shape ``(m, T, S)``; None stands for the first row alone, whose output is then the model's own.
        intercept: Gives a context in which attention goes to another function.

    Returns:
        What the block returns: rows ``(m, S, D)``, or a tuple that begins with them.
    """
    length, exact = x.shape[1], weights is None
    key, value = parts.key, parts.value
    if exact and (
        any(d.training and d.p > 0.0 for d in parts.early) or any(p is not None and not p.certain for p in (key, value))
    ):  # the walk leaves dropout out, and may round a weight that is found out
        key = value = None
    folds = key is not None and value is not None
    on_few = folds and parts.on_few
    on_all = False  # whether modules of the block meet all rows

    def of_few(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() != 3 or t.shape[1] != length:
            return t
        return t[:, :1] if weights is None else mean_rows(weights, t)

    def for_all(out: Tensor) -> Tensor:
        """What was made for the few, ``(m, S, H, d)``, in the place of every row they stand for: what comes next may have something of each row's own."""
        if weights is None:
            return F.pad(out, (0, 0, 0, 0, 0, length - 1))
        return ((weights > 0).to(out.dtype) @ out.flatten(2)).unflatten(2, out.shape[2:])

    def meeting(of_all: _Forward, of_rows: _Forward) -> _Forward:
        return lambda rows: of_all(rows) if on_all else of_rows(of_few(rows))

    def attend_rows(
        plain: Any, query: Tensor, keys: Tensor, values: Tensor, masks: Any, causal: bool, scaling: Any, dropout: float
    ) -> Any:
        nonlocal on_all
        if not on_few:
            query = query[:, :, :1] if weights is None else weights.mT.unsqueeze(1).to(query.dtype) @ query
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        bias = rows_of_bias(masks, causal, length, weights, query)
        on_all = True
        made_of = key.affine(x) if folds and key is not None else keys, values if value is None else value.affine(x)
        on_all = False
        # The exact forward of the first row has the model's dropout; the walk its expectation, none.
        out = attend(query, x, *made_of, bias, dropout if exact else 0.0)
        return (out if on_few else for_all(out)), None

    def attention_of_rows(*args: Any, **kwargs: Any) -> Any:
        nonlocal on_all
        first = args[0] if args else next(iter(kwargs.values()))
        args, kwargs = map_tensors(lambda t: x if t is first else t, (args, kwargs))
        on_all = True
        return map_tensors(of_few, attention(*args, **kwargs))

    attend_rows.exact = exact  # type: ignore[attr-defined]
    attention = parts.attention.forward
    replaced: list[tuple[nn.Module, _Forward]] = [
        (d, meeting(d.forward if exact else lambda rows: rows, _dropout_of_rows(d, notes.stream.kept.get(k, ()))))
        for k, d in enumerate(parts.dropouts)
    ]
    if parts.front is not None:
        replaced.append((parts.front, lambda _: normal))
    if weights is not None:
        of_norms = [_norm_of_rows(norm, notes.stream.scales[k], weights) for k, norm in enumerate(parts.norms)]
        replaced += [(n.module, meeting(n.module.forward, of)) for n, of in zip(parts.norms, of_norms, strict=True)]
    if not on_few:
        if parts.behind is not None and all(parts.behind is not module for module, _ in replaced):
            behind = parts.behind.forward
            replaced.append((parts.behind, lambda rows, *args, **kwargs: behind(of_few(rows), *args, **kwargs)))
        replaced.append((parts.attention, attention_of_rows))
    # What is folded need not be made.
    unmade = (p for p in (key, value) if p is not None and p.alone and (folds or p is value))
    replaced += [(p.module, _unmade(p.shape[0] * p.shape[1])) for p in unmade]
    with ExitStack() as few_need_no_checkpoint, forward_replaced(*replaced), intercept(attend_rows):
        for module in parts.block.modules():
            if getattr(module, "gradient_checkpointing", False):
                few_need_no_checkpoint.enter_context(patch.object(module, "gradient_checkpointing", False))
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


def _norm_of_rows(norm: Norm, noted: Sequence[Tensor], weights: Tensor) -> _Forward:
    scales = iter(noted)

    def forward(rows: Tensor) -> Tensor:
        if rows.dim() != 3:
            return type(norm.module).forward(norm.module, rows)
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
