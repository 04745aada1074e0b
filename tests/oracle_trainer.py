"""LGPTrainer with an oracle in place of its predictor: with exact predictions, every draw must give the full gradient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import CLASS_TOKEN_FAMILIES, OTHER_FAMILIES, TEXT_FAMILIES, TinyImages, TinyTexts, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.engine import LGPEngine
from hf_lgp.old_estimator import control_size


class OracleTrainer(LGPTrainer):
    """Predicts from the second micro-batch on, and every prediction of a covered parameter is the example's exact gradient.

    Attributes:
        uncovered: Control gradients of the parameters without predictions, summed over the micro-batches since the last step.
    """

    uncovered: dict[Tensor, Tensor]
    predicted = 0

    def _lgp_build(self, inputs: dict[str, Any]) -> LGPEngine:
        engine = super()._lgp_build(inputs)
        engine.controls = self._controls  # type: ignore[method-assign]
        engine._correction = self._exact_correction  # type: ignore[method-assign]
        engine.head.register_forward_pre_hook(self._head_will_run)
        self.uncovered = {}
        return engine

    def _controls(self, examples: int) -> int:
        # The first micro-batch is exact, as always: it shows which parameters get a gradient.
        engine = self._lgp_engine
        first = engine is None or not engine.observer.capture.reached
        return examples if first else control_size(examples, self._lgp_settings.control_fraction)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self._inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return super().training_step(model, inputs, *args)

    @torch.compiler.disable
    def _head_will_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]

    def _lgp_predicted_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.model.train()
        self.model(**self._inputs)
        self._all_features = self._features  # with a graph, in the original order
        return super()._lgp_predicted_step(model, inputs, *args)

    def _exact_correction(self, features: Tensor, residuals: Tensor, pullbacks: Tensor) -> list[Tensor | None]:
        engine = self._lgp_engine
        assert engine is not None and engine.observer.current is not None
        self.predicted += 1
        if not self.uncovered:
            predicted = {id(parameter) for _, rule in engine.predicted_rules for parameter in rule.parameters}
            known = predicted | {id(parameter) for parameter in engine.head.parameters()}
            self.uncovered = {p: torch.zeros_like(p) for p in self.model.parameters() if id(p) not in known}
        controls, weight = engine.observer.current.controls, engine.observer.current.weight
        every = self._all_features
        order = torch.stack([(features.detach() - one).abs().sum(1).argmin() for one in every.detach()]).argsort()
        torch.testing.assert_close(every[order], features, rtol=1e-9, atol=1e-9)
        weights = torch.ones_like(pullbacks[:, :1])
        weights[:controls] -= weight
        with torch.enable_grad():
            every = every[order]
            covered = [parameter for _, rule in engine.predicted_rules for parameter in rule.parameters]
            gradients = self._gradients(every, weights * pullbacks, covered)
            chosen = weight * pullbacks[:controls]
            without = self._gradients(every[:controls], chosen, list(self.uncovered))
        for parameter, gradient in zip(self.uncovered, without, strict=True):
            if gradient is not None:
                self.uncovered[parameter] += gradient
        return gradients

    @staticmethod
    def _gradients(features: Tensor, pullbacks: Tensor, parameters: list[Any]) -> list[Tensor | None]:
        if not parameters:
            return []
        return list(torch.autograd.grad(features, parameters, pullbacks, allow_unused=True, retain_graph=True))


class Recorder(TrainerCallback):
    """Keeps the gradients that reach the optimizer at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor | None]] = []
        self.trainer: Any = None
        self.uncovered: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = dict(self.trainer.model.named_parameters())
        self.steps.append({name: None if p.grad is None else p.grad.clone() for name, p in named.items()})
        if isinstance(self.trainer, OracleTrainer):
            self.uncovered.append(
                {
                    name: mean_over_ranks(self.trainer.uncovered[p])
                    for name, p in named.items()
                    if p in self.trainer.uncovered
                }
            )
            for value in self.trainer.uncovered.values():
                value.zero_()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over processes, a copy of the value in a single process."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def squared_distance(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, with Trainer's normalisation over accumulated micro-batches."""
    wanted = torch.nn.functional.one_hot(labels, outputs.logits.shape[-1])
    total = (outputs.logits - wanted).square().sum()
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "some labels ignored": {"labels": "ignored"},
    "label smoothing": {"arguments": {"label_smoothing_factor": 0.2}},
    "multi-label": {"labels": "multi", "model": {"problem_type": "multi_label_classification"}},
    "regression": {"labels": "regression", "model": {"num_labels": 1, "problem_type": "regression"}},
    "compute_loss_func": {"trainer": {"compute_loss_func": squared_distance}},
}
"""Losses: what model, data, arguments and trainer need for each."""

FAMILIES = [*CLASS_TOKEN_FAMILIES, *OTHER_FAMILIES]


@dataclass(frozen=True)
class Case:
    """One combination to check."""

    family: str
    loss: str
    accumulation: int


def every_case() -> list[Case]:
    """All combinations of family, loss and accumulation."""
    return [Case(*combination) for combination in itertools.product(FAMILIES, LOSSES, (1, 3))]


def recorded(kind: type[Trainer], case: Case, folder: Path, **more: Any) -> tuple[Recorder, list[float], Any]:
    """Gradients and logged losses of an epoch whose last batches are not whole, with the parameters held still."""
    loss = LOSSES[case.loss]
    texts = case.family in TEXT_FAMILIES
    # Micro-batches of 6, 6, 6, 6 and 3; two processes share ten, the last of 3, which accelerate fills up.
    examples = 57 if dist.is_initialized() else 27
    data = (TinyTexts if texts else TinyImages)(examples, loss.get("labels", "class"))
    settings: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": case.accumulation,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "ddp_broadcast_buffers": False,  # written in place, while the oracle still holds a graph
        **loss.get("arguments", {}),
        **more,
    }
    if kind is Trainer:
        arguments = TrainingArguments(str(folder), **settings)
    else:
        arguments = LGPTrainingArguments(str(folder), **settings, lgp_control_fraction=1 / 3)
    recorder = Recorder()
    trainer = kind(
        tiny_model(case.family, **loss.get("model", {})),
        arguments,
        train_dataset=data,
        callbacks=[recorder],
        **loss.get("trainer", {}),
    )
    recorder.trainer = trainer
    trainer.train()
    return recorder, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def check(case: Case, folder: Path, tolerance: float = 1e-9, **more: Any) -> None:
    """Compare an epoch of :class:`OracleTrainer` with one of ``Trainer``.

    Args:
        case: The combination.
        folder: Output folder.
        more: Further training arguments for both.
        tolerance: Of each tensor's gradient, relative to its norm (not below a millionth of the whole gradient's).

    Raises:
        AssertionError: If a gradient or a loss differs, or nothing was predicted.
    """
    plain, losses, _ = recorded(Trainer, case, folder, **more)
    oracle, spliced_losses, trainer = recorded(OracleTrainer, case, folder, **more)
    assert trainer.predicted == 4 and len(plain.steps) == -(-5 // case.accumulation) == len(oracle.steps)
    for step, (full, combined, without) in enumerate(zip(plain.steps, oracle.steps, oracle.uncovered, strict=True)):
        scale = torch.stack([g.norm() for g in full.values() if g is not None]).norm()
        for name, exact in full.items():
            found = combined[name]
            if exact is None:
                assert found is None, f"{case}: {name} has no gradient in plain training"
                continue
            assert found is not None, f"{case}: {name} got no gradient"
            if step == 0 and name in oracle.uncovered[-1]:
                continue  # exact and control gradients of the first micro-batches together
            expected = without.get(name, exact)
            error = (found - expected).norm() / expected.norm().clamp(min=1e-6 * scale)
            assert error < tolerance, f"{case}: {name} differs by {error:.2g}"
    assert max(abs(a - b) for a, b in zip(losses, spliced_losses, strict=True)) < 1e-6, case
