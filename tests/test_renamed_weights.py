"""Weights that are saved under converted names come back on resume and at the end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASS_TOKEN_FAMILIES, TinyImages, tiny_classifier, tiny_swin
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_lgp.trainer
from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.renamed_weights import restore_renamed_weights

FAMILIES = pytest.mark.parametrize("family", [*CLASS_TOKEN_FAMILIES, "swin"])


def model_of(family: str) -> Any:
    return tiny_swin() if family == "swin" else tiny_classifier(family, torch.float32)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def moved(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


@FAMILIES
def test_every_tensor_comes_back(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    expected = weights(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert restore_renamed_weights(moved(model), tmp_path, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(model, expected)


def test_a_checkpoint_of_another_model_is_left_to_upstream(tmp_path: Path) -> None:
    model_of("vit").save_pretrained(tmp_path)
    larger = tiny_classifier("vit", torch.float32, num_hidden_layers=3)
    expected = weights(larger)
    assert not restore_renamed_weights(larger, tmp_path, expected)
    assert_same(larger, expected)
    assert not restore_renamed_weights(nn.Linear(2, 2), tmp_path, expected)
    assert not restore_renamed_weights(None, tmp_path, expected)


class Built(type(model_of("vit"))):  # type: ignore[misc]
    """A classifier that a config alone does not build."""

    def __init__(self, config: Any, scale: float) -> None:
        super().__init__(config)
        self.scale = scale


@pytest.mark.parametrize("kind", ["with a part more", "built in another way"])
def test_a_checkpoint_is_loaded_as_far_as_upstream_can_where_the_class_cannot_load_it(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("vit")
    if kind == "with a part more":
        model.extra = nn.Linear(2, 2)
    else:
        model = Built(model.config, 2.0)
    expected = weights(model)
    model.save_pretrained(tmp_path)
    args = LGPTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    LGPTrainer(moved(model), args)._load_from_checkpoint(str(tmp_path))
    if kind == "with a part more":
        assert_same(model, expected)
    else:
        assert "missing keys" in caplog.text


def test_weights_that_are_tied_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(hf_lgp.trainer, "restore_renamed_weights", lambda *_: pytest.fail("it is loaded again"))
    args = LGPTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    LGPTrainer(moved(model), args)._load_from_checkpoint(str(tmp_path))


class Best(TrainerCallback):
    """Remembers the weights at the first evaluation, which is the best one by fiat."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.weights:
            self.weights = weights(model)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_best_model_is_loaded_at_the_end(fraction: float, tmp_path: Path) -> None:
    best, data = Best(), TinyImages(16, dtype=torch.float32)

    class Worsening(LGPTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = float(self.state.global_step)
            return metrics

    arguments = LGPTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=6,
        learning_rate=0.1,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to="none",
        disable_tqdm=True,
        lgp_control_fraction=fraction,
    )
    model = model_of("vit")
    trainer = Worsening(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[best])
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_same(model, best.weights)


def test_upstream_still_needs_this(tmp_path: Path) -> None:
    """Once plain Trainer restores a ViT by itself, remove ``renamed_weights`` and the overrides that call it."""
    model = model_of("vit")
    expected = weights(model)
    model.save_pretrained(tmp_path)
    trainer = Trainer(moved(model), TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
    trainer._load_from_checkpoint(str(tmp_path))
    restored = [torch.equal(model.state_dict()[name], value) for name, value in expected.items()]
    assert not all(restored), "transformers restores renamed weights now: hf_lgp/renamed_weights.py can go"
