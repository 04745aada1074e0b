"""The observer: what the exact examples of a micro-batch teach the predictor.

While a forward and backward pass runs, it collects the exact examples' coordinates (:mod:`~hf_lgp.capture`), what the head
knows about them, and what was predicted for them beforehand. :meth:`Observer.learn` then updates window, alignment and
bases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from .capture import Capture
from .class_path import ClassPath
from .controller import Controller
from .draws import private_seed
from .exchange import Exchange
from .exhaustion import Exhaustion
from .factors import Factors
from .path_terms import PathTerm
from .predictor import GradientPredictor
from .rules import Rule
from .settings import LGPSettings

MEASURED_EXAMPLES = 16
"""Examples whose predictions are compared with their exact gradients, each micro-batch: variances are averaged over time."""

_BASIS_EXAMPLES = 16
"""Examples whose gradients move the bases: enough for 16 to 32 directions when averaged over moves."""

_SKETCHES = 8
"""Random vectors per tensor with which whole gradients are compared with predictions when bases move."""


@dataclass
class Observation:
    """Exact examples of one micro-batch on their way into the predictor.

    Attributes:
        controls: Number of examples with a graph.
        chosen: Which of them are observed.
        weight: Control weight ``w`` that their gradients carry.
        examples: Size ``m`` of the micro-batch.
        features: Head inputs of the observed examples, shape ``(b, D)``.
        pullbacks: ``h`` of the observed examples' own, unscaled losses, shape ``(b, D)``.
        predicted: What the regression predicted for the first of them, shape ``(b', P)``.
        path: Their class-path gradients, by rule.
        path_coordinates: The same in coordinates, shape ``(b, P)``.
    """

    controls: int
    chosen: Tensor | slice
    weight: float | Tensor
    examples: int
    features: Tensor | None = None
    pullbacks: Tensor | None = None
    predicted: Tensor | None = None
    path: list[PathTerm | None] | None = None
    path_coordinates: Tensor | None = None


class Observer:
    """Observes exact examples and lets the predictor learn from them.

    Args:
        rules: The rules of the covered tensors.
        predictor: The predictor that learns.
        controller: Says when bases move and when to refit.
        path: The class-token path, or None.
        settings: The method's settings.
        exchange: Shares what is learnt with other processes.
        device: Where the predictor lives.

    Attributes:
        current: The micro-batch being observed, or None.
        exhaustion: Notes that memory ran out while observing: what was observed is then worth nothing.
        loss_scale: Factor (accumulation, loss scaling) that the backward pass started from; None for 1.
    """

    def __init__(
        self,
        rules: list[Rule],
        predictor: GradientPredictor,
        controller: Controller,
        path: ClassPath | None,
        settings: LGPSettings,
        exchange: Exchange,
        device: torch.device,
    ) -> None:
        self.rules, self.predictor, self.controller = rules, predictor, controller
        self.path, self.settings, self.exchange, self.device = path, settings, exchange, device
        self.exhaustion = Exhaustion()
        self.current: Observation | None = None
        self.loss_scale: Tensor | None = None
        like = predictor.subspace.bases(0)[0]
        self._coordinates = like.new_zeros(self.examples, predictor.subspace.size)
        self._path_coordinates = torch.zeros_like(self._coordinates)
        self._energies = like.new_zeros(4, len(rules))
        self._moving = False
        self.capture = Capture(rules, predictor.subspace, self.exhaustion)

    @property
    def unit(self) -> Tensor | float:
        """Factor between the gradients of this backward pass and those of one example's own, unscaled loss."""
        assert self.current is not None
        if self.loss_scale is None:
            return 1.0 / self.current.examples
        return self.loss_scale.to(self._coordinates.dtype) / self.current.examples

    @property
    def examples(self) -> int:
        """Largest number of exact examples that this process observes per micro-batch."""
        return max(2, self.settings.observe_examples // self.exchange.processes)

    @property
    def watching(self) -> bool:
        """Whether the predictor takes examples from this micro-batch."""
        return self.controller.observes(self.predictor.ready)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Capture the coordinates of :attr:`current` during the forward and backward inside, if it is to be learnt from."""
        assert self.current is not None
        if not self.watching:
            self._moving = False
            yield
            return
        chosen = self.current.chosen
        count = self.current.controls if isinstance(chosen, slice) else len(chosen)
        count = min(count, self.examples)
        self._moving = (
            self.controller.moves_bases(self.predictor.ready, self.predictor.regression.fitted) and count >= 2
        )
        self.capture.arm(
            self._coordinates[:count], self.current.controls, chosen, self._use_for_bases if self._moving else None
        )
        try:
            yield
        finally:
            self.capture.disarm()

    def follow_path(self, pullbacks: Tensor) -> list[PathTerm | None] | None:
        """Path gradients of all examples noted; those of the observed ones in coordinates too.

        Args:
            pullbacks: ``h`` of all examples' own, unscaled losses, observed ones first, shape ``(m, D)``.
        """
        observation = self.current
        if self.path is None or observation is None:
            return None
        assert observation.features is not None
        with record_function("hf_lgp.path"):
            observation.path = self.path.gradients(pullbacks)
        if not self.watching:
            return observation.path
        with record_function("hf_lgp.path_coordinates"):
            observation.path_coordinates = self._coordinates_of(observation.path, len(observation.features))
        return observation.path

    def _coordinates_of(self, terms: list[PathTerm | None], count: int) -> Tensor:
        """Coordinates of the first examples' path gradients, shape ``(count, P)``."""
        coordinates, subspace = self._path_coordinates[:count].zero_(), self.predictor.subspace
        for position, term in enumerate(terms):
            if term is not None:
                projected = term.factors(slice(0, count)).project(*subspace.bases(position))
                subspace.blocks(position, coordinates).copy_(projected)
        return coordinates

    def learn(self) -> None:
        """Let the predictor learn from the micro-batch just observed; call once its backward pass is done."""
        observation, ready = self.current, self.predictor.ready
        if (
            observation is not None
            and self.watching
            and observation.features is not None
            and observation.pullbacks is not None
        ):
            self._take(observation, observation.features, observation.pullbacks)
        self.current = self.loss_scale = None
        self.controller.advance(ready)
        queue_full = self.predictor.waiting + self.examples * self.exchange.processes > self.predictor.queue
        if self.predictor.waiting and self.controller.refit_due(
            self.predictor.remembered, self.predictor.regression.fitted, queue_full
        ):
            with record_function("hf_lgp.refit"):
                self.predictor.refit()
            self.controller.refitted()

    def _take(self, observation: Observation, features: Tensor, pullbacks: Tensor) -> None:
        coordinates = self._coordinates[: len(features)] / (self.unit * observation.weight)
        predicted, path = observation.predicted, observation.path_coordinates
        alignment, subspace = self.predictor.alignment, self.predictor.subspace
        with record_function("hf_lgp.observe"):
            targets = coordinates
            if path is not None:
                targets = coordinates - subspace.per_coordinate(alignment.beta) * path
            self.predictor.observe(*self.exchange.gather(features, pullbacks, targets))
            if predicted is not None:
                measured = [part[: len(predicted)] for part in (coordinates, path) if part is not None]
                exact, *along, foretold = self.exchange.gather(*measured, predicted)
                self.predictor.measure(exact, along[0] if along else None, foretold)
        if self._moving:
            with record_function("hf_lgp.move_bases"):
                shared = subspace.pending() if self.exchange.processes > 1 else []
                if predicted is not None:
                    few = targets[: min(_BASIS_EXAMPLES, len(predicted))]
                    self._energies[3] = subspace.per_tensor_sums((few - few.mean(0)).square().sum(0))
                    shared = [*shared, self._energies]
                self.exchange.average(shared)
                if predicted is not None:
                    error, total, rest, kept = self._energies
                    alignment.update_energies(error, total, kept, rest)
                self.predictor.move_bases()

    def _use_for_bases(self, position: int, factors: Factors) -> None:
        """Take the power step on what the path leaves over, and compare whole gradients with predictions."""
        observation, predictor = self.current, self.predictor
        assert observation is not None
        few = factors.take(_BASIS_EXAMPLES)
        remainder, along = few, None
        term = None if observation.path is None else observation.path[position]
        if term is not None:
            along = term.factors(slice(0, few.examples))
            # In the units of this backward pass: a common factor of all examples does not change the bases.
            remainder = few.minus(along, predictor.alignment.beta[position] * self.unit * observation.weight)
        if observation.predicted is not None:
            self._weigh(position, few, along)
        predictor.subspace.accumulate(position, remainder)

    def _weigh(self, position: int, exact: Factors, along: Factors | None) -> None:
        """Energies of whole gradients and of what predictions leave unexplained, from random sketches."""
        observation, alignment, subspace = self.current, self.predictor.alignment, self.predictor.subspace
        assert observation is not None and observation.predicted is not None
        generator = torch.Generator(self.device)
        generator.manual_seed(private_seed(self.settings.seed, self.controller.seen, position))
        left, right = subspace.bases(position)
        vectors = torch.randn(exact.cols, _SKETCHES, generator=generator, device=self.device, dtype=left.dtype)
        vectors *= _SKETCHES**-0.5
        count = min(exact.examples, len(observation.predicted))
        coordinates = subspace.blocks(position, observation.predicted[:count])
        path, ridge = (coefficients[position] for coefficients in alignment.coefficients)
        total = exact.sketch(vectors)[:count] / (self.unit * observation.weight)
        error = total - ridge * (left @ (coordinates @ (right.T @ vectors)))
        rest = total
        if along is not None:
            parallel = along.sketch(vectors)[:count]
            error = error - path * parallel
            rest = total - alignment.beta[position] * parallel
        for row, values in enumerate((error, total, rest)):
            self._energies[row, position] = (values - values.mean(0)).square().sum()
