"""One call of a trunk: control examples with a graph, the others without, and formula (1) of :mod:`hf_lgp.splice` as its backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..control.measurement import GroupSpread, GroupSums
from ..control.plan import GROUPS, StepPlan, draw_order, identity_order, private_seed
from ..estimator import control_scale, control_size, control_weights
from ..rows.notes import map_tensors
from ..sealed import SpliceError
from .factored import recorded
from .features import features_of
from .outputs import zipped
from .predictor import LinearPredictor, Observation

OBSERVED_EXAMPLES = 64
"""Exact examples of a micro-batch that the predictor learns from, at most."""

Observed = Callable[[GroupSpread], None]

_UNBATCHED = frozenset({"cache_position", "head_mask"})
"""Arguments that have no entry for each example, although their first dimension may equal ``m``."""


class _Joined(torch.autograd.Function):
    """The trunk's outputs for all examples; its backward hands ``delta`` to the call, which gives all gradients."""

    @staticmethod
    def forward(ctx: Any, call: TrunkCall, values: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        # An output that is not read has no gradient, which is not the same as zeros: it is no feature.
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.call.gradients(deltas)


@dataclass(frozen=True)
class _Stream:
    """Examples that went through the trunk together, with a graph of their own.

    Attributes:
        part: Which they are, in the order of the call.
        leaves: Arguments that ask for a gradient.
        observation: What the backward will tell of the first of them.
        out: What the trunk returned.
    """

    part: slice
    leaves: tuple[Tensor, ...]
    observation: Observation | None
    out: Any


class TrunkCall:
    """One call of the trunk: what a backward needs belongs to it, never to the module."""

    def __init__(
        self, forward: Callable[..., Any], plan: StepPlan, number: int, predictor: LinearPredictor, observed: Observed, args: Any, kwargs: Any
    ) -> None:
        self.forward, self.plan, self.predictor, self.observed = forward, plan, predictor, observed
        sizes: list[int] = []
        map_tensors(lambda t: sizes.append(len(t)) if isinstance(t, Tensor) and t.dim() else None, (args, dict(kwargs)))
        if not sizes:
            raise SpliceError("its trunk is called without a tensor")
        self.m = sizes[0]
        self.controls = control_size(self.m, plan.fraction)
        self.whole = self.controls == self.m
        device = predictor.device
        self.order, self.inverse = identity_order(self.m, device) if self.whole else draw_order(self.m, private_seed(plan.seed, number), device)
        groups = min(GROUPS, self.controls) if plan.measure else 1
        bounds = [round(g * self.controls / groups) for g in range(groups + 1)]
        self.inputs: list[tuple[Tensor, bool]] = []
        self.args, self.kwargs = self._ordered(args), {k: v if k in _UNBATCHED else self._ordered(v) for k, v in kwargs.items()}
        # With a graph first: autocast keeps copies of weights, which must not be those made without.
        self.streams = [self._run(slice(*b), OBSERVED_EXAMPLES // groups) for b in pairwise(bounds)]

    def _is_batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.m

    def _ordered(self, value: Any) -> Any:
        """Arguments with control examples first; those that ask for a gradient are noted."""

        def order(t: Any) -> Any:
            batched = self._is_batched(t)
            if batched and not self.whole:
                t = t.index_select(0, self.order)
            if isinstance(t, Tensor) and t.requires_grad:
                self.inputs.append((t, batched))
            return t

        return map_tensors(order, value)

    def _rows(self, part: slice, leaves: list[Tensor] | None) -> tuple[Any, Mapping[str, Any]]:
        """The arguments of some examples; ``leaves`` collects those that ask for a gradient."""

        def take(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            rows = (t[part] if self._is_batched(t) else t).detach()
            if leaves is not None and t.requires_grad:
                leaves.append(rows.requires_grad_())
            return rows

        kwargs = {k: v if k in _UNBATCHED else map_tensors(take, v) for k, v in self.kwargs.items()}
        return map_tensors(take, self.args), kwargs

    def _run(self, part: slice, most: int) -> _Stream:
        leaves: list[Tensor] = []
        args, kwargs = self._rows(part, leaves)
        examples, predictor = part.stop - part.start, self.predictor
        # What is run for a check is not training and teaches nothing.
        observation = None if self.plan.all_control else Observation(predictor, min(examples, most))
        recording = nullcontext() if observation is None else recorded(predictor.layers, examples, len(observation.coordinates), predictor.dtype, observation.arrived)
        with recording:
            return _Stream(part, tuple(leaves), observation, self.forward(*args, **kwargs))

    def finish(self) -> Any:
        """The trunk's output for all examples, in their own order."""
        outs, sizes = [s.out for s in self.streams], [s.part.stop - s.part.start for s in self.streams]
        if not self.whole:
            args, kwargs = self._rows(slice(self.controls, self.m), None)
            with torch.no_grad():
                outs.append(self.forward(*args, **kwargs))
            sizes.append(self.m - self.controls)
        found: list[tuple[Tensor, ...]] = []
        zipped(lambda *tensors: found.append(tensors), *outs)
        for tensors in found:
            if [len(t) if t.dim() else 0 for t in tensors] != sizes or len({(t.shape[1:], t.dtype) for t in tensors}) > 1:
                raise SpliceError("its trunk returns a tensor that has no entry for each example")
        # The streams keep their graphs; what is joined are values.
        values = [tensors[0].detach() if len(tensors) == 1 else torch.cat([t.detach() for t in tensors]) for tensors in found]
        traced = [k for k, tensors in enumerate(found) if tensors[0].requires_grad]
        self.found, self.values = [found[k] for k in traced], [values[k] for k in traced]
        results = [self.in_own_order(value) for value in values]
        if traced:
            control = [t[: self.controls] if batched else t for t, batched in self.inputs]
            with_graph = _Joined.apply(self, [results[k] for k in traced], *control, *self.predictor.parameters)
            for k, result in zip(traced, with_graph, strict=True):
                results[k] = result
        ordered = iter(results)
        return zipped(lambda *_: next(ordered), *outs)

    def in_own_order(self, value: Tensor) -> Tensor:
        """Values of all examples in the order in which they came."""
        return value if self.whole else value.index_select(0, self.inverse)

    def gradients(self, deltas: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the arguments that asked for one and of the trunk's parameters, by formula (1); then the predictor learns.

        Args:
            deltas: Gradients of the outputs; None for those that are not read.
        """
        predictor, scale = self.predictor, control_scale(self.m, self.controls)
        given = {k: d if self.whole else d.index_select(0, self.order) for k, d in enumerate(deltas) if d is not None}
        with torch.no_grad(), torch.autocast(predictor.device.type, enabled=False):
            known = features_of([self.values[k] for k in given], list(given.values()), predictor.dtype)
            # Before anything is learnt from these examples: what is predicted must not depend on the draw.
            weights = control_weights(self.m, self.controls, predictor.dtype, predictor.device)
            predicted = [None] * len(predictor.parameters) if self.whole else predictor.gradients(*known, weights)
        exact = [self._pulled(g, {k: scale * d[stream.part] for k, d in given.items()}) for g, stream in enumerate(self.streams)]
        known = known[0], scale * known[1]
        count = len(self.inputs)
        with torch.no_grad(), torch.autocast(predictor.device.type, enabled=False):
            if self.plan.measure:
                self.observed(self._compared([g[count:] for g in exact], *known))
            self._learn(*known)
            of_parameters = [_sum(each) for each in zip(*(g[count:] for g in exact), predicted, strict=True)]
            of_inputs = [self._joined_argument(k, [g[k] for g in exact]) for k in range(count)]
        return [*of_inputs, *of_parameters]

    def _pulled(self, number: int, deltas: Mapping[int, Tensor]) -> tuple[Tensor | None, ...]:
        """Exact gradients of one stream's arguments and of the parameters."""
        outs, wanted = [self.found[k][number] for k in deltas], [*self.streams[number].leaves, *self.predictor.parameters]
        return torch.autograd.grad(outs, wanted, list(deltas.values()), allow_unused=True)

    def _compared(self, exact: Sequence[Sequence[Tensor | None]], features: Tensor, pulled: Tensor) -> GroupSpread:
        sums = GroupSums()
        for stream, of_stream in zip(self.streams, exact, strict=True):
            part = stream.part
            predicted = self.predictor.gradients(features[part], pulled[part], torch.ones_like(features[part, 0]))
            pairs = [(g, torch.zeros_like(g) if p is None else p) for g, p in zip(of_stream, predicted, strict=True) if g is not None]
            sums.add([g for g, _ in pairs], [p for _, p in pairs])
        return sums.spread()

    def _learn(self, features: Tensor, pulled: Tensor) -> None:
        observations, rows = [], []
        for stream in self.streams:
            if stream.observation is not None:
                observations.append(stream.observation)
                rows.append(slice(stream.part.start, stream.part.start + len(stream.observation.coordinates)))
        if observations:
            self.predictor.observe(torch.cat([features[r] for r in rows]), torch.cat([pulled[r] for r in rows]), observations)

    def _joined_argument(self, k: int, parts: Sequence[Tensor | None]) -> Tensor | None:
        if not self.inputs[k][1] or any(part is None for part in parts):
            return _sum(parts)
        return torch.cat([part for part in parts if part is not None])


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of what is there; None where nothing is."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total
