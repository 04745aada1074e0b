"""Capture: per-example gradient coordinates from an ordinary forward and backward.

Forward hooks note each covered module's input, tensor hooks receive its output gradient during the backward pass, and
both are projected onto the module's bases at once: no per-example gradient is ever formed and nothing outlives the
layer. The hooks add nothing to the graph and change no value, so a captured step computes what an uncaptured one does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from .exhaustion import Exhaustion
from .factors import Factors
from .rules import BroadcastRule, Rule, ScaleRule
from .subspace import Subspace

_BROADCAST_NODES = ("ExpandBackward0", "AddBackward0")
_SCALE_NODES = ("MulBackward0",)
_NODES_SEARCHED = 256


class Capture:
    """Hooks on the modules of ``rules`` that fill a buffer of coordinates; they are there only while armed.

    Args:
        rules: The parameter rules; tensor ``i`` of ``subspace`` belongs to ``rules[i]``.
        subspace: Bases to project on.
        exhaustion: Where to note that memory ran out in a hook.

    Attributes:
        reached: Which rules ever delivered factors: parameters of the others get no gradient (a mask token, a part not in use) or
            one that cannot be told apart by example, and have no prediction.
    """

    def __init__(self, rules: list[Rule], subspace: Subspace, exhaustion: Exhaustion | None = None) -> None:
        self.rules, self.subspace = rules, subspace
        self.exhaustion = exhaustion or Exhaustion()
        self.reached: set[int] = set()
        self._coordinates: Tensor | None = None
        self._examples = 0
        self._chosen: Tensor | slice = slice(None)
        self._consume: Callable[[int, Factors], None] | None = None
        self._handles: list[RemovableHandle] = []

    def arm(
        self,
        coordinates: Tensor,
        examples: int,
        chosen: Tensor | slice = slice(None),
        consume: Callable[[int, Factors], None] | None = None,
    ) -> None:
        """Capture the next forward and backward.

        Args:
            coordinates: Buffer to fill, shape ``(c, P)``; zeroed here.
            examples: Number of examples in the coming forward.
            chosen: Which ``c`` of them to capture.
            consume: Also called with each tensor's factors, for updating the bases.
        """
        self._coordinates = coordinates.zero_()
        self._examples, self._chosen, self._consume = examples, chosen, consume
        self._attach()

    def _attach(self) -> None:
        if self._handles:
            return
        # Before the hooks of others, which may replace the output; and only for now: even an idle hook slows its module down.
        broadcast: dict[nn.Module, list[int]] = {}
        for position, rule in enumerate(self.rules):
            if isinstance(rule, BroadcastRule | ScaleRule):
                broadcast.setdefault(rule.module, []).append(position)
            else:
                hook = partial(self._module_ran, position)
                self._handles.append(rule.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for module, positions in broadcast.items():
            hook = partial(self._owner_ran, positions)
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def disarm(self) -> None:
        """Stop capturing and remove every hook from the model; those of a graph that was never run backward become inert."""
        self._coordinates = None
        self._consume = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _module_ran(
        self, position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._coordinates is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        inputs = args[0] if args else next(iter(kwargs.values()))
        output.register_hook(partial(self._gradient_arrived, position, inputs.detach()))

    def _owner_ran(
        self, positions: list[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._coordinates is None or not isinstance(output, Tensor) or output.grad_fn is None:
            return
        wanted = {self.rules[position].parameters[0]: position for position in positions}
        for node, parameter in _consumers(output.grad_fn, set(wanted)):
            position = wanted[parameter]
            if not isinstance(self.rules[position], ScaleRule):
                if node.name() in _BROADCAST_NODES:
                    node.register_prehook(partial(self._node_gradient_arrived, position, None))
            elif node.name() in _SCALE_NODES:
                # By dimension: where activations are checkpointed, what a node saved is a copy, also of the parameter.
                saved = [o for o in (node._saved_self, node._saved_other) if o is not None]
                scaled = max(saved, key=Tensor.dim, default=None)
                if scaled is not None and scaled.dim() > parameter.dim():
                    node.register_prehook(partial(self._node_gradient_arrived, position, scaled.detach()))

    def _node_gradient_arrived(
        self, position: int, inputs: Tensor | None, gradients: tuple[Tensor | None, ...]
    ) -> None:
        if gradients[0] is not None:
            self._gradient_arrived(position, gradients[0] if inputs is None else inputs, gradients[0])

    def _gradient_arrived(self, position: int, inputs: Tensor, delta: Tensor) -> None:
        if self._coordinates is not None and self.exhaustion.error is None:
            with self.exhaustion.noted():
                self._take(position, inputs, delta, self._coordinates)

    @record_function("hf_lgp.capture")
    @torch.no_grad()
    def _take(self, position: int, inputs: Tensor, delta: Tensor, coordinates: Tensor) -> None:
        if delta.dtype == torch.float16:  # products of scaled gradients overflow half precision
            delta = delta.float()
        factors = self.rules[position].factors(inputs, delta, self._examples, self._chosen)
        if factors is None:
            return
        segment = self.subspace.segments[position]
        columns = slice(segment.start, segment.start + segment.size)
        # A module that runs several times per forward contributes a sum.
        coordinates[:, columns] += self.subspace.project(position, factors).to(coordinates.dtype)
        self.reached.add(position)
        if self._consume is not None:
            self._consume(position, factors)


def _consumers(root: Any, parameters: set[Tensor]) -> list[tuple[Any, Tensor]]:
    """Autograd nodes near ``root`` that take one of ``parameters`` directly."""
    found, seen, frontier = [], {root}, [root]
    while frontier and len(seen) < _NODES_SEARCHED:
        node = frontier.pop(0)
        for child, _ in node.next_functions:
            if child is None or child in seen:
                continue
            variable = getattr(child, "variable", None)
            if variable is not None:
                match = next((p for p in parameters if p is variable), None)
                if match is not None:
                    found.append((node, match))
                continue
            seen.add(child)
            frontier.append(child)
    return found
