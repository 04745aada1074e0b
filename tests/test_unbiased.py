"""Every control draw enumerated in float64: the mean of the estimates is the exact gradient, for any loss of the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, EXAMPLES, READS_FIRST_ROW, inputs_of, logits_of, model_of
from draws import CONTROLS, every_draw
from torch import Tensor, nn

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import row_walk
from hf_lgp.rows.walk import RowBudget


class Weighted(LGPTrainer):
    """Weights of examples that only the loss knows."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        losses = F.cross_entropy(logits_of(model(**without(inputs))), inputs["labels"], reduction="none")
        return (losses * torch.arange(1, 1 + len(losses))).mean()


class Distilled(LGPTrainer):
    """A teacher that sees the whole batch."""

    teacher: Any = None

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.teacher = self.teacher or copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            known = 2.0 * logits_of(self.teacher(**without(inputs))).roll(1, -1).softmax(-1)
        return F.kl_div(logits_of(model(**without(inputs))).log_softmax(-1), known, reduction="batchmean")


class TwoCalls(LGPTrainer):
    """R-Drop: two passes, drawn towards each other."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shifted = {
            k: v.flip(1) if k == "input_ids" else v + 0.1 * v.is_floating_point() for k, v in without(inputs).items()
        }
        one, other = logits_of(model(**without(inputs))), logits_of(model(**shifted))
        return F.cross_entropy(one, inputs["labels"]) + (one.softmax(-1) - other.softmax(-1)).square().sum()


class TwoHeads(LGPTrainer):
    """A second head on what the first one says, of another kind of loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = logits_of(model(**without(inputs)))
        return F.cross_entropy(logits, inputs["labels"]) + F.mse_loss(logits.tanh().sum(-1), inputs["labels"].double())


class Contrastive(LGPTrainer):
    """Supervised contrastive: every example's loss depends on all others."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        z, y = F.normalize(logits_of(model(**without(inputs))), dim=-1), inputs["labels"]
        diagonal = torch.eye(len(z), dtype=z.dtype)
        same = (y[:, None] == y).to(z.dtype) - diagonal
        return -(F.log_softmax(z @ z.T / 0.2 - 1e9 * diagonal, 1) * same).sum() / same.sum()


def without(inputs: Any) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def weighted_classes(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = logits_of(outputs)
    return F.cross_entropy(logits, labels, weight=logits.new_tensor([1.0, 2.0, 3.0]))


LOSSES: dict[str, tuple[type[LGPTrainer], dict[str, Any]]] = {
    "in the model": (LGPTrainer, {}),
    "compute_loss_func": (LGPTrainer, {"compute_loss_func": weighted_classes}),
    "label smoothing": (LGPTrainer, {"label_smoothing_factor": 0.2}),
    "weights of examples": (Weighted, {}),
    "distillation": (Distilled, {}),
    "two calls": (TwoCalls, {}),
    "two heads": (TwoHeads, {}),
    "contrastive": (Contrastive, {}),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_over_all_draws_is_the_exact_gradient(
    architecture: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lora" in architecture:
        pytest.importorskip("peft")
    kind, options = LOSSES[loss]
    settings = {k: options[k] for k in options if k == "label_smoothing_factor"}
    args = LGPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    func = options.get("compute_loss_func")
    trainer = kind(model_of(architecture).eval(), args, compute_loss_func=func)
    model, inputs = trainer.model, inputs_of(architecture)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
        value = trainer.compute_loss(model, dict(inputs))
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def few(count: int) -> Tensor:
        return trainer.compute_loss(model, {name: value[:count] for name, value in inputs.items()})

    method = row_walk(model, few, EXAMPLES, RowBudget(1, 1), intercepted_attention, half=False)
    assert method.has_first_row == (architecture in READS_FIRST_ROW)
    exact_loss, exact = loss_and_gradients()
    largest = max(float(g.norm()) for g in exact)
    plan, single = StepPlan(CONTROLS / EXAMPLES, first_row=True), 0.0
    total, count = [torch.zeros_like(p) for p in parameters], 0
    for _ in every_draw(2 if loss == "two calls" else 1, monkeypatch):
        with method.splice(plan, lambda _: None):
            value, gradients = loss_and_gradients()
        torch.testing.assert_close(value, exact_loss, rtol=1e-12, atol=1e-12)
        total = [s + g for s, g in zip(total, gradients, strict=True)]
        single = max(single, max(float((g - e).norm()) for g, e in zip(gradients, exact, strict=True)) / largest)
        count += 1
    assert single > 1e-4, "a single draw is an estimate"
    for name, sum_, gradient in zip(
        (n for n, p in model.named_parameters() if p.requires_grad), total, exact, strict=True
    ):
        off = float((sum_ / count - gradient).norm())
        assert off <= 1e-10 * max(float(gradient.norm()), 1e-3 * largest), f"{name} is off by {off}"
