"""One call of a trunk: control examples with a graph, the others without, and formula (1) of :mod:`hf_lgp.splice` as its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..control.measurement import GroupSpread, GroupSums
from ..control.plan import StepPlan, draw_order, identity_order, private_seed
from ..estimator import control_scale, control_size, control_weights
from ..sealed import SpliceError
from .arguments import Arguments
from .factored import recorded
from .features import features_of
from .outputs import zipped
from .predictor import LinearPredictor, Observation

OBSERVED_EXAMPLES = 64
"""Exact examples of a micro-batch that the predictor learns from, at most."""

Observed = Callable[[GroupSpread], None]


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
        self,
        forward: Callable[..., Any],
        plan: StepPlan,
        number: int,
        predictor: LinearPredictor,
        observed: Observed,
        args: Any,
        kwargs: Any,
    ) -> None:
        self.forward, self.plan, self.predictor, self.observed = forward, plan, predictor, observed
        self.arguments = Arguments(args, kwargs)
        self.m = self.arguments.m
        self.controls = control_size(self.m, plan.fraction)
        self.whole = self.controls == self.m
        device, seed = predictor.device, private_seed(plan.seed, number)
        self.order, self.inverse = identity_order(self.m, device) if self.whole else draw_order(self.m, seed, device)
        self.arguments.reorder(None if self.whole else self.order)
        groups = min(plan.measure, self.controls) if plan.measure else 1
        bounds = [round(g * self.controls / groups) for g in range(groups + 1)]
        # With a graph first: autocast keeps copies of weights, which must not be those made without.
        self.streams = [self._run(slice(*b), OBSERVED_EXAMPLES // groups) for b in pairwise(bounds)]

    def _run(self, part: slice, most: int) -> _Stream:
        args, kwargs, leaves = self.arguments.rows(part)
        examples, predictor = part.stop - part.start, self.predictor
        if self.plan.all_control:  # a check, not training: it teaches nothing
            return _Stream(part, leaves, None, self.forward(*args, **kwargs))
        count = min(examples, most)
        observation = Observation(predictor, count)
        with recorded(predictor.layers, examples, count, predictor.dtype, observation.arrived):
            return _Stream(part, leaves, observation, self.forward(*args, **kwargs))

    def finish(self) -> Any:
        """The trunk's output for all examples, in their own order."""
        outs, sizes = [s.out for s in self.streams], [s.part.stop - s.part.start for s in self.streams]
        if not self.whole:
            with torch.no_grad():
                args, kwargs, _ = self.arguments.rows(slice(self.controls, self.m))
                outs.append(self.forward(*args, **kwargs))
            sizes.append(self.m - self.controls)
        # Where as many examples are controls as not, an output of just that length cannot be told from one by examples.
        found: list[tuple[Tensor, ...]] = []
        zipped(lambda *tensors: found.append(tensors), *outs)
        for tensors in found:
            alike = len({(t.shape[1:], t.dtype) for t in tensors}) == 1
            if not alike or [len(t) if t.dim() else 0 for t in tensors] != sizes:
                raise SpliceError("its trunk returns a tensor that has no entry for each example")
        # The streams keep their graphs; what is joined are values.
        values = [each[0].detach() if len(each) == 1 else torch.cat([t.detach() for t in each]) for each in found]
        traced = [k for k, tensors in enumerate(found) if tensors[0].requires_grad]
        self.found, self.values = [found[k] for k in traced], [values[k] for k in traced]
        results = [self.in_own_order(value) for value in values]
        if traced:
            control = [t[: self.controls] if batched else t for t, batched in self.arguments.traced]
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
            blank: list[Tensor | None] = [None] * len(predictor.parameters)
            predicted = blank if self.whole else predictor.gradients(*known, weights)
        of_parameters, sums, pieces = predicted, GroupSums(), []
        features, pulled = known[0], scale * known[1]
        for number, stream in enumerate(self.streams):
            outs = [self.found[k][number] for k in given]
            wanted = [*stream.leaves, *predictor.parameters]
            scaled = [scale * d[stream.part] for d in given.values()]
            exact = torch.autograd.grad(outs, wanted, scaled, allow_unused=True)
            of_stream, part = exact[len(stream.leaves) :], stream.part
            pieces.append(exact[: len(stream.leaves)])
            of_parameters = [_sum(pair) for pair in zip(of_parameters, of_stream, strict=True)]
            if self.plan.measure:
                self._compare(sums, of_stream, features[part], pulled[part])
        if self.plan.measure:
            self.observed(sums.spread())
        self._learn(features, pulled)
        of_arguments = [self._joined_argument(k, each) for k, each in enumerate(zip(*pieces, strict=True))]
        return [*of_arguments, *of_parameters]

    @torch.no_grad()
    def _compare(self, sums: GroupSums, exact: Sequence[Tensor | None], features: Tensor, pulled: Tensor) -> None:
        """Add the gradients of one group, exact and predicted."""
        with torch.autocast(features.device.type, enabled=False):
            predicted = self.predictor.gradients(features, pulled, torch.ones_like(features[:, 0]))
        pairs = [(g, p) for g, p in zip(exact, predicted, strict=True) if g is not None]
        sums.add([g for g, _ in pairs], [torch.zeros_like(g) if p is None else p for g, p in pairs])

    @torch.no_grad()
    def _learn(self, features: Tensor, pulled: Tensor) -> None:
        observations = [s.observation for s in self.streams if s.observation is not None]
        rows = [
            slice(s.part.start, s.part.start + len(o.coordinates))
            for s, o in zip(self.streams, observations, strict=False)
        ]
        if observations:
            with torch.autocast(features.device.type, enabled=False):
                features, pulled = (torch.cat([t[r] for r in rows]) for t in (features, pulled))
                self.predictor.observe(features, pulled, observations)

    def _joined_argument(self, k: int, parts: Sequence[Tensor | None]) -> Tensor | None:
        if not self.arguments.traced[k][1] or any(part is None for part in parts):
            return _sum(parts)
        return torch.cat([part for part in parts if part is not None])


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of what is there; None where nothing is."""
    there = [term for term in terms if term is not None]
    return sum(there[1:], start=there[0]) if there else None
