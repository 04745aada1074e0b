"""The promise of the method: the expectation of the combined gradient over control draws is the full gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_classifier
from torch import Tensor
from transformers import Trainer

import hf_lgp.trainer
from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.plans import Plan

EXAMPLES, CONTROLS = 6, 2


def weighted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Class weights: the mean's denominator depends on all examples at once."""
    weight = torch.tensor([1.0, 4.0, 0.5], dtype=outputs.logits.dtype)
    return torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)


CASES: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "some labels ignored": {"labels": "ignored"},
    "label smoothing": {"arguments": {"label_smoothing_factor": 0.2}},
    "multi-label": {"labels": "multi", "model": {"problem_type": "multi_label_classification"}},
    "regression": {"labels": "regression", "model": {"num_labels": 1, "problem_type": "regression"}},
    "class-weighted loss function": {"trainer": {"compute_loss_func": weighted_loss}},
    "DeiT": {"family": "deit"},
    "BEiT": {"family": "beit"},
    "Dinov2": {"family": "dinov2"},
    # the exact examples are observed apart, and control examples take part in the prediction pass
    "compiled": {"arguments": {"torch_compile": True, "torch_compile_backend": "eager"}},
    # what the controller follows where the regression adds too little
    "path alone": {"ridge": False},
    # transformers computes the softmax of eager attention in float32
    "eager attention": {"model": {"attn_implementation": "eager"}, "tolerance": 1e-4, "floor": 1e-3},
    # exact and predicted examples take different ways through the layers, which have to agree but for rounding
    "bf16": {"dtype": torch.float32, "arguments": {"bf16": True}, "tolerance": 0.04, "floor": 1e-2},
}


def fitted_trainer(case: dict[str, Any], folder: Path, **settings: Any) -> tuple[LGPTrainer, TinyImages]:
    """A trainer whose predictor was fitted on exact steps, with the parameters held still."""
    dtype = case.get("dtype", torch.float64)
    data = TinyImages(48, case.get("labels", "class"), dtype=dtype)
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=EXAMPLES,
        learning_rate=0.0,
        max_steps=8,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=CONTROLS / EXAMPLES,
        lgp_warmup_examples=24,
        lgp_window=36,
        lgp_rank=3,
        lgp_refit_steps=2,
        **case.get("arguments", {}),
        **settings,
    )
    model = tiny_classifier(case.get("family", "vit"), dtype=dtype, **case.get("model", {}))
    trainer = LGPTrainer(model, arguments, train_dataset=data, **case.get("trainer", {}))
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]  # keep the fitted predictor after training
    trainer.train()
    return trainer, data


def gradients(trainer: Trainer, step: Any, batch: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients by one training step of the given kind."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    step(trainer, trainer.model, dict(batch), torch.tensor(EXAMPLES))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def every_draw(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]) -> Iterator[None]:
    """Make the trainer use every equally likely control set once."""
    labels = batch["labels"]
    eligible = [i for i in range(EXAMPLES) if labels.is_floating_point() or labels.dim() > 1 or int(labels[i]) != -100]
    for chosen in itertools.combinations(eligible, CONTROLS):
        rest = [i for i in range(EXAMPLES) if i not in chosen]
        draw = torch.tensor([*chosen, *rest]), len(eligible) / CONTROLS
        monkeypatch.setattr(hf_lgp.trainer, "draw_control", lambda *_, draw=draw: draw)
        yield


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("name", CASES)
def test_mean_over_every_draw_is_the_full_gradient(
    name: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, data = fitted_trainer(CASES[name], tmp_path, lgp_kernel=kernel)
    engine = trainer._lgp_engine
    assert engine is not None and engine.predictor.ready
    assert engine.path is not None
    for coefficients in engine.predictor.alignment.coefficients:
        assert (coefficients > 0).sum() > 5
    engine.controller.plan = Plan(CONTROLS / EXAMPLES, CASES[name].get("ridge", True))
    batch = data.batch(30, 36)
    full = gradients(trainer, Trainer.training_step, batch)
    state, counters = engine.state_dict()
    state = {key: value.clone() for key, value in state.items()}
    draws = []
    for _ in every_draw(monkeypatch, batch):
        engine.load_state_dict(state, dict(counters))  # observing a draw must not inform the next one
        draws.append(gradients(trainer, LGPTrainer.training_step, batch))
    assert len(draws) == math.comb(4 if CASES[name].get("labels") == "ignored" else EXAMPLES, CONTROLS)
    for parameter, expected in full.items():
        mean = torch.stack([draw[parameter] for draw in draws]).mean(0)
        spread = torch.stack([draw[parameter] for draw in draws]).std(0).norm()
        # The floor is for key biases: softmax is blind to them and their gradient is rounding.
        error = (mean - expected).norm() / expected.norm().clamp(min=CASES[name].get("floor", 1e-4))
        assert error < CASES[name].get("tolerance", 1e-10), f"{parameter}: {error}"
        if "classifier" in parameter:
            allowed = CASES[name].get("tolerance", 1e-12) * expected.norm().clamp(min=1.0)
            assert spread < allowed, "the head's gradient is exact in every draw"
    trainer._lgp_engine.close()


class _ExactPredictions:
    """Replaces the correction by that of the oracle: every example's prediction is its exact gradient."""

    def __init__(self, trainer: LGPTrainer, batch: dict[str, Tensor], alpha: float) -> None:
        self.trainer, self.alpha = trainer, alpha
        self.per_example = []
        for i in range(EXAMPLES):
            trainer.model.zero_grad()
            one = {name: value[i : i + 1] for name, value in batch.items()}
            Trainer.training_step(trainer, trainer.model, one, torch.tensor(EXAMPLES))
            rules = self.trainer._lgp_engine.rules
            self.per_example.append([p.grad.clone() for rule in rules for p in rule.parameters])

    def __call__(self, features: Tensor, residuals: Tensor, pullbacks: Tensor) -> list[Tensor]:
        order = self.order
        columns = list(zip(*self.per_example, strict=True))
        weight = EXAMPLES / CONTROLS
        return [
            self.alpha * (sum(column) - weight * sum(column[i] for i in order[:CONTROLS].tolist()))
            for column in columns
        ]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_oracle_predictions_give_the_full_gradient_and_none_the_control_gradient(
    alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, data = fitted_trainer({}, tmp_path)
    batch = data.batch(30, 36)
    full = gradients(trainer, Trainer.training_step, batch)
    engine = trainer._lgp_engine
    oracle = _ExactPredictions(trainer, batch, alpha)
    monkeypatch.setattr(engine, "_correction", oracle)
    for _ in every_draw(monkeypatch, batch):
        oracle.order = hf_lgp.trainer.draw_control()[0]
        combined = gradients(trainer, LGPTrainer.training_step, batch)
        part = {name: value[oracle.order[:CONTROLS]] for name, value in batch.items()}
        trainer.model.zero_grad()
        Trainer.training_step(trainer, trainer.model, part, torch.tensor(CONTROLS))
        control = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        expected = full if alpha == 1.0 else control
        for name, value in combined.items():
            target = full[name] if "classifier" in name else expected[name]
            torch.testing.assert_close(value, target, rtol=1e-10, atol=1e-12)
    engine.close()
