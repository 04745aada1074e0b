"""LGPTrainer's life cycle: validation, fallbacks, logs, checkpoints, hooks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyImages, hooks_of, tiny_vit
from torch import Tensor, nn
from transformers import Trainer, ViTForImageClassification

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.engine import SpliceBypassedError
from hf_lgp.head import HeadNotFoundError

QUICK: dict[str, Any] = {
    "lgp_control_fraction": 0.25,
    "lgp_observe_steps": 2,
    "lgp_warmup_examples": 16,
    "lgp_window": 32,
    "lgp_rank": 3,
    "lgp_refit_steps": 2,
    "lgp_basis_steps": 4,
}


def arguments(folder: Path, **settings: Any) -> LGPTrainingArguments:
    return LGPTrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "max_steps": 16,
            "learning_rate": 1e-2,
            "logging_steps": 4,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **QUICK,
            **settings,
        },
    )


def trainer_for(folder: Path, kind: type[LGPTrainer] = LGPTrainer, data: Any = None, **settings: Any) -> LGPTrainer:
    data = data or TinyImages(64, dtype=torch.float32)
    return kind(tiny_vit(torch.float32), arguments(folder, **settings), train_dataset=data)


def test_predictions_are_used_logged_and_every_hook_is_gone_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(tmp_path)
    before = hooks_of(trainer.model)
    trainer.train()
    assert hooks_of(trainer.model) == before
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["lgp_fraction"] == 0.25 and logs[0]["lgp_exact_share"] == 1.0
    assert logs[-1]["lgp_exact_share"] == pytest.approx(trainer._lgp_steps["exact"] / 16)
    assert logs[-1]["lgp_coverage"] == 1.0 and logs[-1]["lgp_window"] == 32
    assert 0 < logs[-1]["lgp_rho2"] <= 1 and 0 < logs[-1]["lgp_alpha"] <= 2
    end = trainer.state.log_history[-1]
    assert end["lgp_exact_share"] == logs[-1]["lgp_exact_share"] and "train_runtime" in end
    line = capsys.readouterr().out
    assert f"LGP: {trainer._lgp_steps['predicted']} of 16 micro-batches with predicted gradients" in line
    assert not any(key.startswith("lgp_") for key in trainer.evaluate(TinyImages(8, dtype=torch.float32)))


def test_the_class_path_is_followed_unless_it_is_switched_off(tmp_path: Path) -> None:
    found = {}
    for on_path in (True, False):
        trainer = trainer_for(tmp_path / str(on_path), lgp_class_path=on_path, lgp_observe_steps=0)
        trainer._lgp_close = lambda: None  # type: ignore[method-assign]
        trainer.train()
        engine = trainer._lgp_engine
        assert engine is not None and (engine.path is not None) == on_path
        assert engine.settings.observe_steps == engine.controller.settings.observe_steps == (8 if on_path else 1)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert (logs[-1]["lgp_alpha_path"] > 0) == on_path
        found[on_path] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        engine.close()
    assert any(not torch.equal(found[True][name], found[False][name]) for name in found[True])


def test_a_head_that_reads_mean_rows_is_predicted_by_the_regression_alone(tmp_path: Path) -> None:
    class MeanPooled(ViTForImageClassification):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            logits = self.classifier(self.vit(pixel_values).last_hidden_state.mean(1))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    model = MeanPooled(tiny_vit(torch.float32).config)
    trainer = LGPTrainer(model, arguments(tmp_path), train_dataset=TinyImages(64, dtype=torch.float32))
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]
    trainer.train()
    assert trainer._lgp_engine is not None and trainer._lgp_engine.path is None
    assert trainer._lgp_steps["predicted"] > 5
    trainer._lgp_engine.close()


def test_a_warmup_longer_than_what_comes_in_between_two_fits_ends(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, lgp_observe_examples=4, lgp_refit_steps=1, lgp_warmup_examples=32)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 8 + 2, "predicted": 6}


def test_two_trainers_live_in_one_process_without_hearing_each_other(tmp_path: Path) -> None:
    alone = trainer_for(tmp_path)
    alone.train()
    other = trainer_for(tmp_path)

    class Interleaved(LGPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 9:
                other.train()
            return super().training_step(*args, **kwargs)

    both = trainer_for(tmp_path, Interleaved)
    state = torch.get_rng_state()
    both.train()
    torch.set_rng_state(state)
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, both.model.state_dict()[name]), name
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_second_train_starts_afresh(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.train()
    assert trainer._lgp_steps["exact"] == 4 and trainer._lgp_steps["predicted"] == 12


def test_batches_of_one_and_batches_without_labels_are_exact(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, per_device_train_batch_size=1)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 16, "predicted": 0}

    class Unlabelled(TinyImages):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"pixel_values": self.pixels[index]}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.square().mean()

    trainer = LGPTrainer(
        tiny_vit(torch.float32),
        arguments(tmp_path),
        train_dataset=Unlabelled(64, dtype=torch.float32),
        compute_loss_func=loss,
    )
    trainer.train()
    assert trainer._lgp_steps == {"exact": 16, "predicted": 0}


def test_a_batch_whose_control_examples_would_all_be_unlabelled_is_exact(tmp_path: Path) -> None:
    """Control examples are drawn among the labelled: fewer of those than controls, and the gradient is the full one."""
    trainer = trainer_for(tmp_path, learning_rate=0.0, max_grad_norm=0.0)
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]
    trainer.train()
    batch = TinyImages(64, dtype=torch.float32).batch(0, 8)
    batch["labels"] = torch.tensor([-100, -100, -100, 2, -100, -100, -100, -100])
    trainer.current_gradient_accumulation_steps = 1
    gradients = []
    for step in (Trainer.training_step, LGPTrainer.training_step):
        trainer.model.zero_grad()
        loss = step(trainer, trainer.model, dict(batch), torch.tensor(1))
        gradients.append([loss, *(p.grad.clone() for p in trainer.model.parameters())])
    assert trainer._lgp_steps["predicted"] == 13
    for exact, predicted in zip(*gradients, strict=True):
        torch.testing.assert_close(predicted, exact, rtol=1e-4, atol=1e-6)


def test_the_callers_batch_is_left_alone(tmp_path: Path) -> None:
    class Watching(LGPTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
            before = {name: value.clone() for name, value in inputs.items()}
            result = super().training_step(model, inputs, *args)
            assert inputs.keys() == before.keys()
            assert all(torch.equal(inputs[name], before[name]) for name in before)
            return result

    trainer_for(tmp_path, Watching, label_smoothing_factor=0.1).train()


def test_an_overridden_compute_loss_is_honoured(tmp_path: Path) -> None:
    seen = []

    class Focal(LGPTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            seen.append((len(inputs["pixel_values"]), len(outputs.logits), len(labels)))
            loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
            loss = ((1 - (-loss).exp()) * loss).mean()
            return (loss, outputs) if return_outputs else loss

    trainer_for(tmp_path, Focal).train()
    assert (8, 8, 8) in seen and (2, 8, 8) in seen


def test_a_compute_loss_that_bypasses_the_model_is_an_error(tmp_path: Path) -> None:
    class Bypass(LGPTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if self._lgp_engine is not None and self._lgp_engine.predictor.ready:
                return sum(p.square().sum() for p in model.parameters())
            return super().compute_loss(model, inputs)

    with pytest.raises(SpliceBypassedError, match="compute_loss"):
        trainer_for(tmp_path, Bypass).train()


def test_non_finite_features_drop_the_correction_and_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(LGPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            engine = self._lgp_engine
            if engine is not None and self.state.global_step == 10:
                original = engine.predictor.kernel_rows
                engine.predictor.kernel_rows = lambda *_: original(*_) * torch.nan
                try:
                    return super().training_step(*args, **kwargs)
                finally:
                    engine.predictor.kernel_rows = original
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr("hf_lgp.plans.RIDGE_COST", 0.0)  # the regression is used beside the path, whatever it gains
    trainer = trainer_for(tmp_path, Poisoned)
    logging.getLogger("transformers").propagate = True
    logging.getLogger("hf_lgp").propagate = True
    with caplog.at_level("WARNING"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["lgp_nonfinite"] == 1 and 0 < logs[-1]["lgp_rho2"] <= 1


def test_non_finite_gradients_of_one_step_do_not_poison_the_predictor(tmp_path: Path) -> None:
    class Poisoned(LGPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.nan if self.state.global_step in (2, 9) else loss

        def training_step(self, model: nn.Module, *args: Any) -> Tensor:
            loss = super().training_step(model, *args)
            if self.state.global_step in (2, 9):
                model.zero_grad()  # what a gradient scaler does with such a step
            return loss

    trainer = trainer_for(tmp_path, Poisoned, logging_nan_inf_filter=False)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["lgp_rho2"] > 0


def test_resume_goes_on_bit_for_bit_and_checkpoints_hold_no_tensor_of_ours_in_the_model(tmp_path: Path) -> None:
    straight = trainer_for(tmp_path / "a", save_strategy="steps", save_steps=10)
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-10"
    ours = {path.name for path in checkpoint.iterdir() if path.name.startswith("lgp_")}
    assert ours == {"lgp_state.safetensors", "lgp_state.json"}
    assert not any("lgp" in name for name in load_file(checkpoint / "model.safetensors"))
    resumed = trainer_for(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed._lgp_steps == straight._lgp_steps


@pytest.mark.parametrize(
    ("damage", "steps"),
    [
        ("missing", {"exact": 4, "predicted": 2}),
        ("truncated", {"exact": 4, "predicted": 2}),
        ("other rank", {"exact": 4 + 4, "predicted": 6 + 2}),
    ],
)
def test_an_unusable_state_starts_afresh(damage: str, steps: dict[str, int], tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=10).train()
    checkpoint = tmp_path / "checkpoint-10"
    state = checkpoint / "lgp_state.safetensors"
    if damage == "missing":
        state.unlink()
    elif damage == "truncated":
        state.write_bytes(state.read_bytes()[:100])
    resumed = trainer_for(tmp_path, **({"lgp_rank": 2} if damage == "other rank" else {}))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 16
    assert resumed._lgp_steps == steps, "the six steps after the checkpoint gather a window anew"


def test_no_unique_head_is_an_error_unless_one_is_named(tmp_path: Path) -> None:
    class Echoing(ViTForImageClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.echo = nn.Linear(3, 3)
            self.loss_type = "ForImageClassification"  # transformers reads it off the class's name

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            self.echo(outputs.logits)
            return outputs

    model = Echoing(tiny_vit().config)
    data = TinyImages(64, dtype=torch.float32)
    with torch.no_grad():
        model.echo.weight.copy_(torch.eye(3))
        model.echo.bias.zero_()
    opaque: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    with pytest.raises(HeadNotFoundError, match=r"Several.*classifier, echo.*lgp_head"):
        LGPTrainer(model, arguments(tmp_path, **opaque), train_dataset=data).train()
    settings = arguments(tmp_path, **opaque, lgp_head="classifier")
    named = LGPTrainer(model, settings, train_dataset=data)
    named.train()
    assert named._lgp_steps["predicted"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lgp_control_fraction": -0.1}, "lgp_control_fraction"),
        ({"lgp_variance_budget": 0.9}, "lgp_variance_budget"),
        ({"lgp_control_fraction": 1.5}, "lgp_control_fraction"),
        ({"lgp_window": 0}, "lgp_window"),
        ({"lgp_rank": -1}, "lgp_rank"),
        ({"lgp_ridge": 0.0}, "lgp_ridge"),
        ({"lgp_kernel": "poly"}, "linear, rbf"),
    ],
)
def test_bad_settings_fail_when_arguments_are_made(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_settings_changed_later_are_validated_at_train(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.args.lgp_ridge = -1.0
    with pytest.raises(ValueError, match="lgp_ridge"):
        trainer.train()


def test_arguments_survive_their_json_form(tmp_path: Path) -> None:
    values = json.loads(arguments(tmp_path).to_json_string())
    assert values["lgp_window"] == 32 and values["lgp_kernel"] == "rbf"
