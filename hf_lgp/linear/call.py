"""One call of a trunk: control examples with a graph, the others without, and formula (1) of :mod:`hf_lgp.splice` as its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..call import Observed
from ..control.measurement import GroupSums
from ..control.plan import StepPlan, draw_order, identity_order, private_seed
from ..estimator import control_size, control_weights
from ..sealed import SpliceError
from ..splice import Spliced
from .factored import recorded
from .kernel_ridge import features_of
from .predictor import LinearPredictor, Observation

OBSERVED_EXAMPLES = 64  # of a micro-batch's exact ones, at most
_UNBATCHED = ("cache_position", "head_mask")  # no entry for each example, although their first dimension may equal m


class TrunkCall:
    """One call of the trunk, the ``number``-th of its step: what a backward needs belongs to it, never to the module.

    Arguments whose first dimension is that of the first tensor among them have an entry for each example. Raises :class:`SpliceError` if
    there is no tensor among them, or one that asks for a gradient.
    """

    def __init__(
        self, predictor: LinearPredictor, plan: StepPlan, number: int, observed: Observed, args: Any, kwargs: Any
    ) -> None:
        self.predictor, self.plan, self.observed = predictor, plan, observed
        leaves, self.spec = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        self.m = m = next((len(t) for t in tensors if t.dim()), 0)
        if m == 0 or any(t.requires_grad for t in tensors):
            raise SpliceError("its trunk is called without examples, or with a tensor that asks for a gradient")
        self.controls = control_size(m, plan.fraction)
        self.whole = self.controls == m
        device, seed = predictor.device, private_seed(plan.seed, number)
        self.order, self.inverse = identity_order(m, device) if self.whole else draw_order(m, seed, device)
        fixed = {id(kwargs.get(name)) for name in _UNBATCHED}
        self.batched = [isinstance(t, Tensor) and t.shape[:1] == (m,) and id(t) not in fixed for t in leaves]
        self.leaves = [self._in(self.order, t) if b else t for t, b in zip(leaves, self.batched, strict=True)]
        self.groups = groups = min(plan.measure, self.controls) if plan.measure else 1
        # Groups of control examples, then the others.
        bounds = [*(round(g * self.controls / groups) for g in range(groups + 1)), *[m] * (not self.whole)]
        self.parts = [slice(*b) for b in pairwise(bounds)]
        most = 0 if plan.all_control else OBSERVED_EXAMPLES // groups  # a check, not training, teaches nothing
        counts = [min(p.stop - p.start, most) if p.start < self.controls else 0 for p in self.parts]
        self.told = [Observation(predictor, count) for count in counts]

    def _in(self, order: Tensor, value: Tensor) -> Tensor:
        return value if self.whole else value.index_select(0, order)

    def _run(self, forward: Callable[..., Any], part: slice, told: Observation) -> tuple[list[Any], Any]:
        rows = [t[part] if b else t for t, b in zip(self.leaves, self.batched, strict=True)]
        args, kwargs = tree_unflatten(rows, self.spec)
        sizes = part.stop - part.start, len(told.coordinates)
        hooks = recorded(self.predictor.layers, *sizes, self.predictor.dtype, told.arrived)
        control, kind = part.start < self.controls, self.predictor.device.type
        # What autocast keeps must not be weights without a graph.
        own = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        cast = torch.autocast(kind, enabled=own[0], dtype=own[1], cache_enabled=control)
        with torch.set_grad_enabled(control), hooks, cast:
            return tree_flatten(forward(*args, **kwargs))

    def run(self, forward: Callable[..., Any]) -> Any:
        """The trunk's output for all examples, in their own order; :class:`SpliceError` if it cannot be put together from parts."""
        # Control examples last: what the trunk leaves on itself is theirs, which has a graph, so that its use is noticed.
        outs = [self._run(forward, *each) for each in [*zip(self.parts, self.told, strict=True)][::-1]][::-1]
        if any((spec, [*map(type, out)]) != (outs[0][1], [*map(type, outs[0][0])]) for out, spec in outs):
            raise SpliceError("its trunk does not return the same for all examples")
        sizes = [part.stop - part.start for part in self.parts]
        results: list[Any] = []
        traced: dict[int, tuple[Tensor, ...]] = {}
        for each in zip(*(leaves for leaves, _ in outs), strict=True):
            results.append(each[0])
            if not isinstance(each[0], Tensor):
                if not isinstance(each[0], bool | int | float | str | None):
                    raise SpliceError(f"its trunk returns a {type(each[0]).__name__}, which has no parts")
                continue
            shapes = [(size, *each[0].shape[1:]) for size in sizes]
            if [t.shape for t in each] != shapes or len({t.dtype for t in each}) > 1:
                raise SpliceError("its trunk returns a tensor that has no entry for each example")
            value = torch.cat([t.detach() for t in each]) if len(each) > 1 else each[0].detach()
            results[-1] = self._in(self.inverse, value)
            if each[0].requires_grad:
                traced[len(results) - 1] = (value, *each)
        self.values, self.found = [value for value, *_ in traced.values()], [each for _, *each in traced.values()]
        if traced:
            joined = Spliced.apply(
                None, lambda: tuple(results[k].detach() for k in traced), self._pull, *self.predictor.parameters
            )
            for k, result in zip(traced, joined, strict=True):
                results[k] = result
        return tree_unflatten(results, outs[0][1])

    def _pull(self, *deltas: Tensor | None) -> tuple[None, list[Tensor | None]]:
        with torch.autocast(self.predictor.device.type, enabled=False):
            return None, self._gradients(deltas)

    def _gradients(self, deltas: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the trunk's parameters by formula (1), from those of its outputs, None if not read; then the predictor learns."""
        predictor, scale = self.predictor, self.m / self.controls
        given = {k: self._in(self.order, delta) for k, delta in enumerate(deltas) if delta is not None}
        features, pulled = features_of([self.values[k] for k in given], list(given.values()), predictor.dtype)
        totals, sums = list[Tensor | None]([None] * len(predictor.parameters)), GroupSums()
        if not self.whole:
            # Before anything is learnt from these examples: what is predicted must not depend on the draw.
            weights = control_weights(self.m, self.controls, predictor.dtype, predictor.device)
            totals = predictor.gradients(features, pulled, weights)
        pulled = scale * pulled
        for number, part in enumerate(self.parts[: self.groups]):
            outs, scaled = [self.found[k][number] for k in given], [scale * delta[part] for delta in given.values()]
            exact = torch.autograd.grad(outs, predictor.parameters, scaled, allow_unused=True)
            # Two parameters may be given parts of the same tensor.
            totals = [a if b is None else b.clone() if a is None else a + b for a, b in zip(totals, exact, strict=True)]
            if self.plan.measure:
                guess = predictor.gradients(features[part], pulled[part], torch.ones_like(features[part, 0]))
                nothing = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in predictor.parameters]
                # The same tensors in every group and process, whatever their examples reach.
                both = ([zero if g is None else g for g, zero in zip(e, nothing, strict=True)] for e in (exact, guess))
                sums.add(*both)
        if self.plan.measure:
            self.observed(sums.spread())
        if not self.plan.all_control:
            known = zip(self.parts, self.told, strict=True)
            seen = [slice(part.start, part.start + len(told.coordinates)) for part, told in known]
            features, pulled = (torch.cat([t[rows] for rows in seen]) for t in (features, pulled))
            predictor.observe(features, pulled, self.told)
        return totals
