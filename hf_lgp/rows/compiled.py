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

from .leaves import Fixed, Leaves, run_eagerly, standing_in

logger = logging.getLogger(__name__)

_OFTEN = 8  # steps in which a shape is seen before it is compiled: a last batch that is incomplete comes once an epoch
_TENSOR = object()
_MOST = 2  # graphs of a kind; what would need more runs as it is, and so does what could not be traced as often
_KEPT = 4096  # shapes that are counted
# Graphs that are captured would overwrite one another: many are called between a forward and its backward.
_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


class _Graph(NamedTuple):
    run: Callable[..., Any]
    spec: TreeSpec
    others: list[Any]  # what is returned besides tensors, _TENSOR in the place of those


class Compiled:
    """Runs functions of blocks as compiled graphs, and what cannot be traced as it is; ``backend`` and ``mode`` are ``torch.compile``'s."""

    def __init__(self, backend: str | None = None, mode: str | None = None) -> None:
        self._backend, self._mode = backend or "inductor", _MODES.get(mode or "", mode)
        self._seen: Counter[Any] = Counter()
        self._failed: Counter[str] = Counter()  # by kind
        self._known: dict[Any, _Graph | None] = {}
        self._shapes: set[Any] = set()  # of which there is a graph
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
        fixed: Fixed,
    ) -> Any:
        """What a function of tensors gives that finds the block's parameters in the block: a :data:`~hf_lgp.rows.leaves.Run`."""
        told, state = fixed(), _state(block)
        if told is None or state is None:
            return run_eagerly(kind, block, leaves, function, tensors, fixed)
        own = (t for m in block.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        held = {id(t): leaves.get(id(t), t) for t in own}
        inputs = [*held.values(), *tensors]
        shapes = tuple((*t.shape, t.dtype, t.requires_grad) for t in inputs)
        shape = kind, shapes, told, torch.is_grad_enabled()
        key = id(block), state, shape
        if key not in self._known:
            self._seen = Counter() if len(self._seen) > _KEPT else self._seen
            self._seen[key] += 1
            enough = self._failed[kind] >= _MOST or (shape not in self._shapes and self.graphs[kind] >= _MOST)
            if enough or self._seen[key] <= _OFTEN:
                return run_eagerly(kind, block, leaves, function, tensors, fixed)
            self._known[key] = self._graph(kind, block, list(held), function, inputs)
            self._shapes.add(shape)
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
            if kind == "control" and not _same_gradients(flat, module, inputs):
                raise ValueError("it has a gradient of its own")
        except Exception as error:
            self._failed[kind] += 1
            logger.warning(f"Blocks run uncompiled as {kind}: {type(error).__name__}: {error}")
            return None
        shapes = [(*t.shape, *t.stride(), t.dtype) for t in inputs]
        text = kind, f"{module.code}\n{shapes}"
        if text not in self._by_text:
            if self.graphs[kind] >= _MOST:
                logger.warning(f"Some blocks run uncompiled as {kind}: more than {_MOST} graphs would be needed.")
                return None
            self._by_text[text] = torch.compile(module, dynamic=False, backend=self._backend, mode=self._mode)
        return _Graph(self._by_text[text], *told)


def _state(block: nn.Module) -> tuple[Any, ...] | None:
    """What a graph would take for fixed: numbers and words in a block's modules; None if hooks or checkpointing ask for the block itself."""
    found: list[Any] = []
    for module in block.modules():
        own = vars(module)
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or (own.get("gradient_checkpointing") and module.training)
        ):
            return None
        found += ((name, value) for name, value in own.items() if isinstance(value, (bool, int, float, str)))
        found += ((name, repr(value)) for name, value in own.items() if name == "scaling" and isinstance(value, dict))
    return tuple(found)


def _same_gradients(one: Callable[..., Any], other: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    """Whether two functions have the same gradients: tracing sees no autograd functions and no ``torch.no_grad``."""
    wanted = [t for t in inputs if t.requires_grad]
    found: list[list[Tensor]] = []
    for function in (one, other):
        with torch.random.fork_rng(devices=[inputs[0].device] if inputs[0].is_cuda else []):
            torch.manual_seed(0)
            out = function(*inputs)[0]
            cotangent = torch.randn(out.shape, dtype=out.dtype, device=out.device)
        gradients = torch.autograd.grad(out, wanted, cotangent, allow_unused=True) if out.requires_grad else wanted
        found.append([torch.zeros(()) if g is None else g for g in gradients])
    largest = max((float(g.norm()) for g in found[0]), default=0.0)
    pairs = zip(*found, strict=True)
    return all(float((a - b).norm()) <= 1e-2 * max(float(a.norm()), 1e-2 * largest) for a, b in pairs)
