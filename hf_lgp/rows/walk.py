"""The walk: from the last block to the first, each block itself is called on a few rows while its attention reads all rows.

At each block ``S = 1 + K`` rows per example are followed: the first row and ``K`` means of groups of the others. Autograd gives the
gradients of the block's parameters, of the followed rows, and of the rows that attention reads. A group's gradient is the sum over its rows; the row that stands for
it is their mean, weighted by what each was asked so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FoldedAttention, rows_of_bias
from .groups import group_rows, row_weights
from .norms import norm_of_means, noted_norm
from .notes import BlockNotes, StreamNotes
from .parts import BlockParts, Intercept, forward_replaced


@contextmanager
def noting(parts: BlockParts) -> Iterator[Callable[[], StreamNotes]]:
    """A context in which a block notes what :func:`run_rows` needs; gives a function that tells what was noted."""
    scales: dict[nn.Module, list[Tensor]] = {norm: [] for norm in parts.norms}
    kept: dict[nn.Module, list[Tensor]] = {}

    def norm_forward(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            if rows.dim() != 3:
                return type(norm).forward(norm, rows)
            out, scale = noted_norm(norm, rows)
            scales[norm].append(scale)
            return out

        return forward

    def dropout_forward(dropout: nn.Dropout) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            out = type(dropout).forward(dropout, rows)
            if rows.dim() == 3:
                with torch.no_grad():
                    kept[dropout].append((out[:, :1] != 0).to(out.dtype) / (1.0 - dropout.p))
            return out

        return forward

    active = [dropout for dropout in parts.dropouts if dropout.training and 0.0 < dropout.p < 1.0]
    kept.update({dropout: [] for dropout in active})
    replaced = [(norm, norm_forward(norm)) for norm in parts.norms] + [(d, dropout_forward(d)) for d in active]
    with forward_replaced(*replaced):
        yield lambda: StreamNotes(_frozen(scales), _frozen(kept))


def _frozen(noted: Mapping[nn.Module, list[Tensor]]) -> dict[nn.Module, tuple[Tensor, ...]]:
    return {module: tuple(calls) for module, calls in noted.items()}


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

    Args:
        parts: The block.
        notes: What was noted of its forward.
        x: What keys and values are made of, shape ``(m, T, D)``.
        rows: The rows to follow, shape ``(m, S, D)``.
        normal: The same after the block's front norm; None where it has none.
        weights: What they consist of, shape ``(m, T, S)``; None for the first row alone.
        intercept: Gives a context in which attention goes to another function.

    Returns:
        What the block returns: rows of shape ``(m, S, D)``, or a tuple that begins with them.
    """
    nothing = x.new_zeros(())
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    if parts.front is not None:
        replaced.append((parts.front, lambda _: normal))
    if weights is not None:
        replaced += [(norm, _norm_of_rows(norm, notes.stream.scales[norm], weights)) for norm in parts.norms]
    for dropout in parts.dropouts:
        replaced.append((dropout, _dropout_of_rows(dropout, notes.stream.kept.get(dropout, ()))))
    found: list[Tensor] = []

    def attend(
        plain: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        scale = kwargs.get("scaling")
        q = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        if parts.key is None and not found:
            found.extend((key, value))
            raise _Read
        bias = rows_of_bias(mask, weights, q.dtype)
        shape = (len(q), *((q.shape[1], q.shape[2]) if parts.key is None else (q.shape[2], q.shape[1])), x.shape[1])
        # The exact forward of the first row has the model's dropout; the walk its expectation, none.
        kept = _kept(q, shape, kwargs.get("dropout", 0.0)) if weights is None else None
        if parts.key is None or parts.value is None:
            scores = q @ found[0].mT
            scores = scores if bias is None else scores + bias
            p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
            return ((p if kept is None else p * kept) @ found[1]).transpose(1, 2), None
        k, v = (layer.weight.to(q.dtype).view(q.shape[1], q.shape[3], -1) for layer in (parts.key, parts.value))
        b = None if parts.value.bias is None else parts.value.bias.to(q.dtype).view(q.shape[1], 1, -1)
        bias = None if bias is None else bias.transpose(1, 2)
        return FoldedAttention.apply(
            q.transpose(1, 2).contiguous(), k, v, b, x.to(q.dtype), bias, kept, parts.key.bias
        ), None

    if parts.key is None:
        plain_forward = parts.attention.forward

        def attention_forward(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            of_all = [
                (d, d.__class__.forward.__get__(d) if weights is None else lambda rows: rows) for d in parts.dropouts
            ]
            with forward_replaced(*of_all), suppress(_Read):
                plain_forward(x, *args, **kwargs)  # makes keys and values of all rows in its own way
            return plain_forward(first, *args, **kwargs)

        replaced.append((parts.attention, attention_forward))
    else:
        # The followed rows need no keys and values of their own.
        unmade = lambda layer: lambda first: nothing.expand(*first.shape[:-1], layer.out_features)  # noqa: E731
        replaced += [(layer, unmade(layer)) for layer in (parts.key, parts.value) if layer is not None]
    with forward_replaced(*replaced), _without_checkpoint(parts.block), intercept(attend):
        return type(parts.block).forward(
            parts.block, rows, *notes.args, **notes.kwargs
        )  # not one that was put in its place


def _kept(like: Tensor, shape: Sequence[int], p: float) -> Tensor | None:
    """What dropout leaves of attention probabilities: 0 or ``1 / (1 - p)``; None where it is off."""
    return F.dropout(like.new_ones(shape), p) if p > 0.0 else None


@contextmanager
def _without_checkpoint(block: nn.Module) -> Iterator[None]:
    """A few rows need no activation checkpointing."""
    before = block.__dict__.get("gradient_checkpointing")
    if not before:
        yield
        return
    block.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        block.__dict__["gradient_checkpointing"] = before


def _norm_of_rows(norm: nn.LayerNorm, scales: Sequence[Tensor], weights: Tensor) -> Callable[[Tensor], Tensor]:
    calls = iter(scales)

    def forward(rows: Tensor) -> Tensor:
        if rows.dim() != 3:
            return type(norm).forward(norm, rows)
        return norm_of_means(norm, rows, weights.mT @ next(calls).to(weights.dtype))

    return forward


def _dropout_of_rows(dropout: nn.Dropout, kept: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The first row meets the dropout that it met in the forward; a mean of rows its expectation, none."""
    calls = iter(kept)

    def forward(rows: Tensor) -> Tensor:
        if rows.dim() != 3 or not kept:
            return rows if kept else type(dropout).forward(dropout, rows)
        first = rows[:, :1] * next(calls)
        return first if rows.shape[1] == 1 else torch.cat([first, rows[:, 1:]], 1)

    return forward


def first_row_of_block(
    parts: BlockParts, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], intercept: Intercept
) -> Any:
    """A block's output for the first row of every example, exact, with a graph.

    Args:
        parts: The block.
        hidden: Rows that enter it, shape ``(m, T, D)``.
        args: Its other arguments.
        kwargs: Those given by name.
        intercept: Gives a context in which attention goes to another function.

    Returns:
        What the block returns: rows of shape ``(m, 1, D)``, or a tuple that begins with them. For all examples that costs some half a percent of
        a training step.
    """
    x = hidden if parts.front is None else parts.front(hidden)
    normal = None if parts.front is None else x[:, :1]
    notes = BlockNotes(hidden, args, kwargs, frozenset(), StreamNotes({}, {}))
    return run_rows(parts, notes, x, hidden[:, :1], normal, None, intercept)


class Gradients:
    """Sums of gradients by parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sums: dict[int, Tensor] = {}

    def add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of some parameters; None adds nothing."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self._sums.get(id(parameter))
                self._sums[id(parameter)] = gradient if before is None else before + gradient

    def in_order(self) -> list[Tensor | None]:
        """The sums, in the order of the parameters; None where nothing was added."""
        return [self._sums.get(id(parameter)) for parameter in self.parameters]


def walk(
    parts: Sequence[BlockParts],
    notes: Sequence[BlockNotes],
    delta: Tensor,
    parameters: Sequence[nn.Parameter],
    groups: int,
    needs_input: bool,
    intercept: Intercept,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Predicted gradients of a stack's input and parameters: ``sum_i`` of the predictor's ``J_i^T delta_i``.

    Args:
        parts: The blocks, in order.
        notes: What was noted of each.
        delta: Gradients of the loss with respect to the stack's output, shape ``(m, T, D)``; each example's may carry a weight.
        parameters: Parameters of the blocks whose gradients are wanted.
        groups: ``K``, the number of mean rows.
        needs_input: Whether the gradient of the input is wanted.
        intercept: Gives a context in which attention goes to another function.

    Returns:
        The input's gradient, shape ``(m, T, D)``, or None if it is not wanted, and the parameters', None where there is none.
    """
    wanted = {id(parameter) for parameter in parameters}
    of_block = [[p for p in part.block.parameters() if id(p) in wanted] for part in parts]
    first = 0 if needs_input else next(i for i, own in enumerate(of_block) if own)
    member = group_rows(notes[min(1, len(notes) - 1)].hidden, groups)
    arriving = member.mT.to(delta.dtype) @ delta
    asked = delta.norm(dim=-1, keepdim=True)
    sums = Gradients(parameters)
    for i in reversed(range(first, len(parts))):
        weights = row_weights(member, asked)
        of_rows, of_hidden, own = _walk_block(parts[i], notes[i], weights, arriving, of_block[i], intercept)
        sums.add(of_block[i], own)
        if i == 0:
            return torch.baddbmm(of_hidden, weights.to(of_rows.dtype), of_rows), sums.in_order()
        asked = asked + of_hidden.norm(dim=-1, keepdim=True)
        arriving = torch.baddbmm(of_rows, member.mT.to(of_hidden.dtype), of_hidden)
    return None, sums.in_order()


def _walk_block(
    parts: BlockParts,
    notes: BlockNotes,
    weights: Tensor,
    arriving: Tensor,
    parameters: Sequence[nn.Parameter],
    intercept: Intercept,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Gradients of the followed rows ``(m, S, D)``, of all rows as attention reads them ``(m, T, D)``, and of parameters."""
    hidden = notes.hidden.detach().requires_grad_()
    turned = weights.mT.to(hidden.dtype)
    with torch.enable_grad():
        rows = (turned @ notes.hidden).requires_grad_()
        x = hidden if parts.front is None else parts.front(hidden)
        normal = None if parts.front is None else turned.to(x.dtype) @ x
        out = run_rows(parts, notes, x, rows, normal, weights, intercept)
        out = out[0] if isinstance(out, tuple) else out
    of_rows, of_hidden, *own = torch.autograd.grad(
        out, [rows, hidden, *parameters], arriving.to(out.dtype), allow_unused=True
    )
    return of_rows, of_hidden, own


@contextmanager
def replayed_autocast(device: str, dtype: torch.dtype, enabled: bool) -> Iterator[None]:
    """The forward's autocast: a backward runs outside it."""
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=True, cache_enabled=False))
        yield
