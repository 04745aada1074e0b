"""Functions of a block as graphs of tensors, compiled once for all blocks that are alike.

A function is traced through everything that is done to the block in between (replaced forwards, leaves, autocast, even autograd), down to a graph of operations
that has all it reads as inputs. Blocks whose graphs are the same text share what was compiled of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .leaves import Leaves, run_eagerly, standing_in

logger = logging.getLogger(__name__)

_OFTEN = 8  # steps in which a shape is seen before it is compiled: a last batch that is incomplete comes once an epoch
_TENSOR = object()
_MOST = 2  # graphs of a kind; what would need more runs as it is


class _Graph(NamedTuple):
    run: Callable[..., Any]
    spec: TreeSpec
    others: list[Any]  # what is returned besides tensors, _TENSOR in the place of those


class Compiled:
    """Runs functions of blocks as compiled graphs, given ``torch.compile``'s options, and what cannot be traced as it is."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._seen: Counter[Any] = Counter()
        self._known: dict[Any, _Graph | None] = {}
        self._by_text: dict[tuple[str, str], Callable[..., Any]] = {}

    @property
    def graphs(self) -> Counter[str]:
        """Number of graphs of each kind of function."""
        return Counter(kind for kind, _ in self._by_text)

    def __call__(
        self,
        kind: str,
        block: nn.Module,
        leaves: Leaves,
        function: Callable[..., Any],
        tensors: Sequence[Tensor],
        fixed: str = "",
    ) -> Any:
        """What a function of tensors gives that finds the block's parameters in the block; ``fixed`` tells what else it depends on."""
        held = {
            id(t): t for m in block.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        held = {key: leaves.get(key, t) for key, t in held.items()}
        inputs = [*held.values(), *tensors]
        shapes = tuple((*t.shape, t.dtype, t.requires_grad) for t in inputs)
        shape = kind, shapes, fixed, block.training, torch.is_grad_enabled()
        key = id(block), shape
        if key not in self._known:
            self._seen[key] += 1
            if self._seen[key] <= _OFTEN:
                return run_eagerly(kind, block, leaves, function, tensors, fixed)
            self._known[key] = self._graph(kind, block, list(held), function, inputs)
        if (graph := self._known[key]) is None:
            return run_eagerly(kind, block, leaves, function, tensors, fixed)
        # What autocast casts is cast in the graph; an outer stance keeps the model itself from running compiled.
        with torch.compiler.set_stance("default"), torch.autocast(tensors[0].device.type, enabled=False):
            found = iter(graph.run(*inputs))
        return tree_unflatten([next(found) if other is _TENSOR else other for other in graph.others], graph.spec)

    def _graph(
        self, kind: str, block: nn.Module, held: list[int], function: Callable[..., Any], inputs: list[Tensor]
    ) -> _Graph | None:
        told: list[Any] = []

        def flat(*inputs: Tensor) -> list[Tensor]:
            with standing_in(block, dict(zip(held, inputs, strict=False))):
                leaves, spec = tree_flatten(function(*inputs[len(held) :]))
            told[:] = spec, [_TENSOR if isinstance(t, Tensor) else t for t in leaves]
            return [t for t in leaves if isinstance(t, Tensor)]

        try:
            with torch.compiler.set_stance("force_eager"):
                module = make_fx(flat, tracing_mode="fake")(*inputs)
            if any(node.op == "get_attr" for node in module.graph.nodes):
                raise ValueError("it reads a tensor that is none of its inputs")
        except Exception as error:
            logger.warning(f"Blocks run uncompiled as {kind}: {type(error).__name__}: {error}")
            return None
        shapes = [(*t.shape, *t.stride(), t.dtype) for t in inputs]
        text = kind, f"{module.code}\n{shapes}"
        if text not in self._by_text:
            if self.graphs[kind] >= _MOST:
                return None
            self._by_text[text] = torch.compile(module, dynamic=False, **self._options)
        return _Graph(self._by_text[text], *told)
