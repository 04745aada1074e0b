"""The engine: one model's hooks, predictor and controller, and the walk through a step.

It knows ``torch.nn`` only. A trainer asks for the next control fraction, runs its ordinary step inside :meth:`LGPEngine.exact`
or :meth:`LGPEngine.spliced`, and calls :meth:`LGPEngine.finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .class_path import ClassPath, same_features
from .controller import Controller
from .costs import REHEARSALS, REHEARSED, REHEARSED_PART
from .old_estimator import control_size
from .exchange import Exchange
from .families import find_backbone
from .injection import Splice, splice_head
from .observer import MEASURED_EXAMPLES, Observation, Observer
from .path_terms import PathTerm
from .plans import FRACTIONS
from .prediction_pass import prediction_pass
from .predictor import GradientPredictor
from .review import Review
from .row_notes import is_active
from .rules import Rule, coverage, part_name, trunk_rules
from .settings import LGPSettings
from .subspace import Subspace

_APART_EXAMPLES = 16
"""Largest number of examples in an observation pass of its own: it is paid for, unlike a ride on the control pass."""


_COMPILED_FRACTIONS = (0.375,)
"""Control fractions to choose from where every one is a graph of its own to compile: within the default budget from a ρ² of 0.97 on."""


class SpliceBypassedError(RuntimeError):
    """The control forward did not pass through the head's hook, so its gradient would lack the correction."""


class LGPEngine:
    """Predicted gradients with a control variate for one model.

    Args:
        model: The user's model, unwrapped; it gets hooks, nothing else.
        head: Its classification head.
        settings: The method's settings.
        device: Where the predictor lives.
        apart: Whether exact examples are observed in passes of their own, because the model's own passes are compiled: the
            control pass then carries the splice and nothing else.

    Attributes:
        coverage: Share of the trunk's trainable parameters that have a rule.
        predictor: The gradient predictor.
        controller: The controller.
        stepping: Whether a training step is in progress that is more than Trainer's own.

    Raises:
        ValueError: If no trunk parameter can be predicted.
    """

    def __init__(
        self, model: nn.Module, head: nn.Linear, settings: LGPSettings, device: torch.device, apart: bool = False
    ) -> None:
        if apart:
            settings = replace(settings, observe_examples=min(settings.observe_examples, _APART_EXAMPLES))
        self.head, self.device, self._given, self.apart = head, device, settings, apart
        self.rules = trunk_rules(model, head)
        if not self.rules:
            raise ValueError(
                "No parameter of the trunk has a prediction rule (is everything but the head frozen?): "
                "use `lgp_control_fraction=1`, or unfreeze some layers."
            )
        backbone = find_backbone(model)
        on_path = backbone is not None and settings.class_path
        self.settings = settings = settings.resolved(on_path)
        self._whole = model, head
        self.coverage = coverage(self.rules, *self._whole)
        dtype = torch.promote_types(torch.float32, head.weight.dtype)
        shapes = [(rule.rows, rule.cols) for rule in self.rules]
        ranks = [settings.rank * rule.rank_factor for rule in self.rules]
        subspace = Subspace(shapes, ranks, seed=settings.seed, device=device, dtype=dtype)
        exchange = Exchange()
        gathered = max(settings.observe_examples, 2 * exchange.processes)
        self.predictor = GradientPredictor(
            subspace,
            head.in_features,
            settings.window,
            # Room for what comes in between two fits, and for what the first fit waits for.
            queue=max(
                gathered * -(-settings.refit_steps // settings.observe_steps),
                # The path may turn out not to be followed.
                max(settings.warmup_examples, self._given.resolved(on_path=False).warmup_examples) + gathered,
            ),
            kernel=settings.kernel,
            ridge=settings.ridge,
            memory=settings.memory_steps / settings.observe_steps,
            device=device,
            dtype=dtype,
        )
        # What memory may not suffice for stands above: nothing is hooked to the model yet.
        self.path = ClassPath(backbone, self.rules) if backbone is not None and on_path else None
        self.shortcut = None if backbone is None else prediction_pass(model, head, backbone, self.path)
        self.controller = Controller(settings, self.path is not None, _COMPILED_FRACTIONS if apart else FRACTIONS)
        self.review = Review(self.controller, self.predictor.alignment, self._weights(), exchange, device)
        self.observer = Observer(self.rules, self.predictor, self.controller, self.path, settings, exchange, device)
        self._nonfinite = torch.zeros((), device=device, dtype=torch.long)
        self._collected: tuple[Tensor, Tensor] | None = None
        self._collecting = self.stepping = False
        self._splice: tuple[Tensor, float | Tensor] | None = None
        if apart:
            torch.compiler.reset()  # compiled code does not look for hooks that came later, be it of another model of this class
        self._handle = head.register_forward_hook(torch.compiler.disable(self._head_ran) if apart else self._head_ran)

    # -- what a trainer calls ------------------------------------------------------------------------------------------

    def controls(self, examples: int) -> int:
        """Number of control examples of the next micro-batch; equal to ``examples`` when the step is to be exact."""
        return control_size(examples, self.controller.now(self.predictor.ready).fraction)

    def begin(self, examples: int, size: int) -> None:
        """Begin a micro-batch: review the plan if that is due, and start the clock.

        Args:
            examples: Size ``m`` of the micro-batch.
            size: Entries of the model's input, the unit of work in which times are compared.
        """
        if self.path is not None:
            self.path.attach()
        self.review.begin(self.predictor.ready, examples, size)
        self.stepping = True

    def rest(self) -> bool:
        """Count the next micro-batch and be done with it, if it is exact and nothing is to be learnt from it."""
        ready = self.predictor.ready
        if not self.controller.rests(ready):
            return False
        self.wait()
        self.controller.advance(ready)
        return True

    def wait(self) -> bool:
        """Let the next micro-batch pass without counting it; always true."""
        self.review.end()
        if self.path is not None and not self.apart:  # compiled code would not notice
            self.path.detach()
        return True

    @property
    def rehearsing(self) -> bool:
        """Whether the next micro-batch is one to :meth:`rehearse` with."""
        return self.controller.rehearses(self.predictor.ready)

    @torch.no_grad()
    def rehearse(
        self, inputs: Mapping[str, Any], forward: Callable[[], Any], examples: int, size: int, whole: bool = True
    ) -> None:
        """Time the prediction of a micro-batch, for no other use: where that alone is dear, nothing need be learnt.

        Args:
            inputs: The model's inputs, without labels.
            forward: Runs the model on them.
            examples: Their number.
            size: Entries of the model's input.
            whole: Whether these are all examples of the micro-batch; a :data:`~hf_lgp.costs.PART` of them otherwise.
        """
        try:
            for _ in range(REHEARSALS):
                self.review.stopwatch.start()
                self.predict(inputs, forward, examples, 0)
                if self.path is not None and self._collected is not None:
                    pullbacks = torch.zeros_like(self._collected[0], dtype=self.predictor.subspace.bases(0)[0].dtype)
                    for term in self.path.gradients(pullbacks):
                        if term is not None:
                            term.total(torch.zeros_like(pullbacks[:, 0]), None)
                self.review.stopwatch.stop((REHEARSED if whole else REHEARSED_PART, size), size)
        finally:
            self._collected = None
            if self.path is not None:
                self.path.release()  # the exact step that follows needs the memory

    @property
    def observing(self) -> bool:
        """Whether the micro-batch in progress is observed or has predictions."""
        return self.observer.current is not None

    def record_loss_scale(self, gradient: Tensor) -> None:
        """Hook for the loss: note the factor (accumulation, loss scaling) that its backward pass starts from."""
        self.observer.loss_scale = gradient.detach()

    @contextmanager
    def exact(self, examples: int, seed: int) -> Iterator[None]:
        """Observe a plain forward and backward of ``examples`` examples, if it is to be observed, without changing its result."""
        if not self.observer.watching:
            yield
            return
        chosen: Tensor | slice = slice(None)
        if examples > self.observer.examples:
            order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
            chosen = order[: self.observer.examples].to(self.device, non_blocking=True)
        self.observer.current = Observation(examples, chosen, 1.0, examples)
        if self.path is not None:
            count = min(examples, self.observer.examples)
            self.path.start(count)
            self.path.arm(slice(0, count), chosen)
        with self._armed():
            yield

    @record_function("hf_lgp.predict")
    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Any], forward: Callable[[], Any], examples: int, controls: int) -> None:
        """Run the prediction examples of a micro-batch without a graph; call before :meth:`spliced`.

        Args:
            inputs: The model's inputs for the prediction examples, without labels; for all examples, control examples first, where
                :attr:`predicts_all`.
            forward: Runs the model on them; called unless the backbone has a cheaper pass of its own.
            examples: Size ``m`` of the micro-batch.
            controls: Number ``m_c`` of control examples.
        """
        self._collecting = True
        try:
            if self.path is not None:
                self.path.start(examples)
                self.path.arm(slice(0 if self.predicts_all else controls, examples))
            features = None if self.shortcut is None else self.shortcut.features(inputs)
            if features is None:
                forward()
            else:
                self.head(features)
        finally:
            self._collecting = False
            if self.path is not None:
                self.path.disarm()

    def verify_backbone(self, inputs: Mapping[str, Any], forward: Callable[[], Any], examples: int) -> bool:
        """Check on a few examples that the head reads the class row as the backbone's parts suggest.

        The class path is given up if it does not, the shorter prediction pass if its result is another than the model's.

        Args:
            inputs: The model's inputs for these examples, without labels.
            forward: Runs the model on them and must not draw other random numbers than the prediction pass.
            examples: Their number.

        Returns:
            Whether the class path is followed.
        """
        if self.path is None and self.shortcut is None:
            return False
        self._collecting = True
        with torch.no_grad():
            try:
                if self.path is not None:
                    self.path.start(examples)
                    self.path.arm(slice(0, examples))
                forward()
                assert self._collected is not None
                expected, self._collected = self._collected[0], None
                if self.path is not None and not self.path.reads_class_row(expected):
                    self._give_up_path()
                if self.shortcut is not None:
                    features = self.shortcut.features(inputs)
                    if features is None or not same_features(expected, features, exactly=True):
                        self.shortcut = None
            finally:
                self._collecting = False
                if self.path is not None:
                    self.path.disarm()
        return self.path is not None

    def verify_shortcut(
        self, inputs: Mapping[str, Any], forward: Callable[[], Any], seeded: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Check path and shorter prediction pass once more, in training mode: what draws at random may rule them out.

        Args:
            inputs: The model's inputs for a few examples, without labels.
            forward: Runs the model on them with the random numbers that ``seeded`` gives.
            seeded: A context with the same random numbers at every entry.
        """
        if self.path is not None and self.apart:
            blocks = self.path.backbone.blocks
            if any(map(is_active, self._whole[0].modules())) or any(b.attention_dropout() > 0.0 for b in blocks):
                # The path would be noted under another dropout than the residuals of control examples, and only of theirs:
                # their predictions would have another distribution, and the estimate a bias.
                self._give_up_path()
        if self.shortcut is None:
            return
        path, self.shortcut.path = self.shortcut.path, None
        self._collecting = True
        try:
            with torch.no_grad():
                with seeded():
                    features = self.shortcut.features(inputs)
                forward()
        finally:
            self._collecting = False
            self.shortcut.path = path
        assert self._collected is not None
        expected, self._collected = self._collected[0], None
        if features is not None and not same_features(expected, features, exactly=True):
            self.shortcut = None

    def _give_up_path(self) -> None:
        assert self.path is not None
        self.path.close()
        self.path = self.observer.path = self.shortcut = None
        settings = self._given.resolved(on_path=False)
        self.settings = self.controller.settings = self.observer.settings = settings
        self.controller.follow(on_path=False)
        self.predictor.memory = settings.memory_steps / settings.observe_steps

    @contextmanager
    def spliced(self, order: Tensor, controls: int, weight: float | Tensor) -> Iterator[None]:
        """Splice the collected prediction examples into the forward and backward of the control examples inside.

        Args:
            order: Positions of all examples in the original micro-batch, control examples first, shape ``(m,)``.
            controls: Number of control examples.
            weight: Control weight of :func:`draw_control`.

        Raises:
            SpliceBypassedError: If the forward inside never reached the head.
        """
        chosen = slice(0, 0 if self.apart else min(controls, self.observer.examples))
        self.observer.current = Observation(controls, chosen, weight, len(order))
        self._splice = order, weight
        if self.predicts_all:
            assert self._collected is not None
            features, logits = self._collected
            self._collected = features[controls:], logits[controls:]
        elif self.path is not None and not self.apart:
            self.path.arm(slice(0, controls))
        try:
            with nullcontext() if self.apart else self._armed():
                yield
            if self._splice is not None:
                raise SpliceBypassedError(
                    "The model's forward did not run its classification head inside `compute_loss`, so predictions could not "
                    "be used. Call the model in `compute_loss`, or use `lgp_control_fraction=1`."
                )
        finally:
            self._splice = self._collected = None

    def finish(self) -> None:
        """Let the predictor learn from the micro-batch just observed; call once its backward pass is done.

        Raises:
            RuntimeError: Where memory ran out, here or in the passes before; nothing is lost but the predictor.
        """
        self.stepping = False
        if self.observer.exhaustion.error is not None:
            raise self.observer.exhaustion.error
        self.observer.learn()

    @property
    def predicts_all(self) -> bool:
        """Whether control examples take part in the prediction pass, because the path cannot be noted in their own."""
        return self.apart and self.path is not None

    def clipped_ranks(self) -> int:
        """Number of weight matrices that are narrower than the rank on some side."""
        return sum(
            1 < min(rule.rows, rule.cols) < self.settings.rank
            for rule in self.rules
            if len(rule.parameters[0].shape) > 1
        )

    def close(self) -> None:
        """Remove every hook from the model."""
        self.observer.capture.disarm()
        if self.path is not None:
            self.path.close()
        self._handle.remove()

    def metrics(self) -> dict[str, float]:
        """Readings for a log; this waits for the device."""
        alignment = self.predictor.alignment
        path, ridge = alignment.coefficients
        names = ("rho2", "alpha", "alpha_path", "captured")
        values = torch.stack([v.mean() for v in (alignment.rho2, ridge, path, alignment.captured)]).tolist()
        return {
            **dict(zip(names, values, strict=True)),
            **self.review.metrics(self.predictor.ready),
            "window": float(self.predictor.size),
            "coverage": coverage([rule for _, rule in self.predicted_rules], *self._whole),
            "nonfinite": float(self._nonfinite),
        }

    def _weights(self) -> Tensor:
        """Share of every rule's parameters in the trunk's and in each part's, shape ``(1 + parts, L)``.

        What has no rule keeps its variance whole, so rows may sum to less than 1.
        """
        model, head = self._whole
        own = {id(parameter) for parameter in head.parameters()}
        sizes: dict[str, float] = {}
        part_of: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                part_of[id(parameter)] = part = part_name(name)
                sizes[part] = sizes.get(part, 0.0) + parameter.numel()
        parts = list(sizes)
        weights = torch.zeros(1 + len(parts), len(self.rules), dtype=torch.float64)
        for position, rule in enumerate(self.rules):
            part = part_of[id(rule.parameters[0])]
            count = sum(parameter.numel() for parameter in rule.parameters)
            weights[0, position] = count / sum(sizes.values())
            weights[1 + parts.index(part), position] = count / sizes[part]
        return weights.to(self.device)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and counters needed to go on exactly where this engine stands."""
        reached = torch.zeros(len(self.rules), dtype=torch.bool)
        reached[sorted(self.observer.capture.reached)] = True
        own = {"reached": reached, "nonfinite": self._nonfinite}
        counters = {**self.controller.state_dict(), "timed": self.review.state_dict()}
        return {**self.predictor.state_dict(), **own}, counters

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state belongs to another model or other settings.
        """
        if tensors["reached"].shape != (len(self.rules),):
            raise ValueError("The stored predictor covers other parameters.")
        if missing := {*self.controller.state_dict(), "timed"} - counters.keys():
            raise ValueError(f"The stored predictor's format is another, without {', '.join(sorted(missing))}.")
        self.predictor.load_state_dict(tensors)
        self._nonfinite.copy_(tensors["nonfinite"])
        self.observer.capture.reached = set(tensors["reached"].nonzero().flatten().tolist())
        self.controller.load_state_dict(counters)
        self.review.load_state_dict(counters["timed"])

    # -- what happens inside a step --------------------------------------------------------------------------------------

    @property
    def predicted_rules(self) -> list[tuple[int, Rule]]:
        """Rules, with their positions, whose parameters get predictions: those that an exact gradient has reached before."""
        reached = self.observer.capture.reached
        return [(position, rule) for position, rule in enumerate(self.rules) if position in reached]

    @property
    def _measured(self) -> int:
        return MEASURED_EXAMPLES if self.controller.measures(self.predictor.ready) else 0

    @contextmanager
    def _armed(self) -> Iterator[None]:
        try:
            with self.observer.observing():
                yield
        finally:
            if self.path is not None:
                self.path.disarm()

    def _head_ran(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        features = args[0]
        if self._collecting:
            self._collected = features.detach(), output.detach()
        elif self._splice is not None:
            order, weight = self._splice
            assert self._collected is not None
            self._splice = None
            splice = Splice(*self._collected, order, weight, self._spared_correction)
            parameters = [parameter for _, rule in self.predicted_rules for parameter in rule.parameters]
            return splice_head(self.head, features, output, splice, parameters)
        elif self.observer.current is not None and output.requires_grad:
            detached = features.detach()
            output.register_hook(lambda residuals: self._residuals_arrived(detached, residuals))
        elif not self.stepping:  # a callback runs the model: no part of the micro-batch
            self.review.end()
        return None

    @torch.no_grad()
    def _residuals_arrived(self, features: Tensor, residuals: Tensor) -> None:
        """An exact step's residuals: note what the regression needs of the chosen examples."""
        observation = self.observer.current
        if observation is not None:
            with self.observer.exhaustion.noted():
                self._note_residuals(observation, features, residuals)

    def _note_residuals(self, observation: Observation, features: Tensor, residuals: Tensor) -> None:
        wide = torch.promote_types(torch.float32, residuals.dtype)
        observation.features = features[observation.chosen].to(wide)
        pullbacks = residuals[observation.chosen].to(wide) @ self.head.weight.to(wide)
        observation.pullbacks = pullbacks / self.observer.unit
        self.observer.follow_path(observation.pullbacks)
        self._predict_measured(observation)

    def _predict_measured(self, observation: Observation) -> None:
        """Predict the exact examples that predictions are compared with, for no other use."""
        assert observation.features is not None and observation.pullbacks is not None
        if self.predictor.regression.fitted and self._measured and len(observation.features):
            few = slice(0, self._measured)
            rows = self.predictor.kernel_rows(observation.features[few], observation.pullbacks[few])
            observation.predicted = self.predictor.predict(rows)

    def _spared_correction(self, features: Tensor, residuals: Tensor, pullbacks: Tensor) -> Sequence[Tensor | None]:
        """:meth:`_correction`, or none where memory does not suffice: the control gradient alone is unbiased too."""
        with self.observer.exhaustion.noted():
            return self._correction(features, residuals, pullbacks)
        return [None for _, rule in self.predicted_rules for _ in rule.parameters]

    @record_function("hf_lgp.correction")
    @torch.no_grad()
    def _correction(self, features: Tensor, residuals: Tensor, pullbacks: Tensor) -> list[Tensor | None]:
        """``alpha * (sum_all g_hat - w sum_S g_hat)`` for every covered parameter, in the units of this backward pass."""
        observation = self.observer.current
        assert observation is not None
        predictor, unit = self.predictor, self.observer.unit
        pullbacks = pullbacks / unit
        observation.features = features[: observation.controls][observation.chosen]
        observation.pullbacks = pullbacks[: observation.controls][observation.chosen]
        weights = torch.ones_like(pullbacks[:, 0])
        weights[: observation.controls] -= observation.weight
        finite, correction = torch.ones_like(self._nonfinite, dtype=torch.bool), None
        if self.controller.plan.ridge:
            rows = predictor.kernel_rows(features, pullbacks)
            measured = rows[: observation.controls][observation.chosen][: self._measured]
            predicted = predictor.predict(torch.cat([weights[None] @ rows, measured]))
            observation.predicted = predicted[1:] if len(measured) else None
            path_alpha, ridge_alpha = predictor.alignment.coefficients
            correction = predicted[0] * predictor.subspace.per_coordinate(ridge_alpha) * unit
            # A non-finite prediction is dropped where it stands: what remains is the control gradient alone, still unbiased.
            finite = correction.isfinite().all()
            correction = torch.where(finite, correction, torch.zeros_like(correction))
        else:
            path_alpha = predictor.alignment.path_coefficient
            self._predict_measured(observation)
        terms = self.observer.follow_path(pullbacks)
        self._nonfinite += ~finite if self.path is None else ~(finite & self.path.finite.all())
        return self._assemble(correction, terms, weights * (path_alpha[:, None] * unit))

    @record_function("hf_lgp.lift")
    def _assemble(
        self, correction: Tensor | None, terms: list[PathTerm | None] | None, weights: Tensor
    ) -> list[Tensor | None]:
        """Parameter gradients from the regression's coordinates, if it predicts, and the path's weighted terms."""
        gradients: list[Tensor | None] = []
        factors = None if correction is None else self.predictor.subspace.lift_factors(correction)
        for position, rule in self.predicted_rules:
            lifted = None if factors is None else factors[position]
            term = None if terms is None else terms[position]
            if term is not None:
                own = term.total(weights[position], lifted)
            elif lifted is not None:
                own = rule.gradients(lifted[0] @ lifted[1].T)
            else:
                gradients.extend([None] * len(rule.parameters))
                continue
            gradients.extend(g.reshape(p.shape).to(p.dtype) for g, p in zip(own, rule.parameters, strict=True))
        return gradients
