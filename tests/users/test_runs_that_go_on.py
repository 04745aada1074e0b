"""A second ``train()``, the best model at the end, and checkpoints: of this version, of another, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_same_weights, losses
from safetensors.torch import load_file
from tiny import TinyImages, tiny_vit
from torch import Tensor

from hf_lgp import LGPTrainer

DATA = TinyImages(32, dtype=torch.float32)


def trainer_for(folder: Path, kind: type[LGPTrainer] = LGPTrainer, **settings: Any) -> LGPTrainer:
    return kind(tiny_vit(torch.float32), arguments(folder, **settings), train_dataset=DATA, eval_dataset=DATA)


def test_a_second_train_starts_its_counts_afresh(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    first = trainer._lgp
    trainer.train()
    assert trainer._lgp is not first and trainer._lgp_steps == {"exact": 0, "predicted": 6}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_second_train_may_have_other_settings(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.args.lgp_control_fraction = 1.0
    trainer.train()
    assert trainer._lgp is None
    trainer.args.lgp_ridge = -1.0
    with pytest.raises(ValueError, match="lgp_ridge"):
        trainer.train()


def test_two_trainers_in_one_process_do_not_hear_each_other(tmp_path: Path) -> None:
    alone, other = trainer_for(tmp_path), trainer_for(tmp_path)
    alone.train()

    class Interleaved(LGPTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 3 and not other.state.global_step:
                state = torch.get_rng_state()
                other.train()
                torch.set_rng_state(state)
            return super().training_step(*args, **kwargs)

    both = trainer_for(tmp_path, Interleaved)
    both.train()
    assert_same_weights(both.model, alone.model)
    assert_same_weights(other.model, alone.model)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Worsening(LGPTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}

    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(tmp_path, Worsening, **saving, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert_same_weights(trainer.model, best)


def test_checkpoints_resume_bit_for_bit_and_hold_nothing_of_ours_in_the_model(tmp_path: Path) -> None:
    straight = trainer_for(tmp_path / "straight", save_strategy="steps", save_steps=4)
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    ours = {path.name for path in checkpoint.iterdir() if path.name.startswith("lgp_")}
    assert ours == {"lgp_state.safetensors", "lgp_state.json"}
    assert not any("lgp" in name for name in load_file(checkpoint / "model.safetensors"))
    resumed = trainer_for(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed.model, straight.model)
    assert resumed._lgp_steps == straight._lgp_steps == {"exact": 0, "predicted": 6}


OLD = {"predictor": {"remembered": 32}, "controller": {"reviews": 3, "fraction": 0.25}, "exact": 4, "predicted": 2}


@pytest.mark.parametrize("damage", ["another version's", "another version's fields", "list", "truncated", "missing"])
def test_an_unusable_state_is_a_warning_and_a_fresh_start(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    state = checkpoint / "lgp_state.json"
    known = json.loads(state.read_text())
    if damage == "missing":
        state.unlink()
    else:
        known["controller"] = {**known["controller"], "coverage": 1.0}
        contents = {"another version's": OLD, "another version's fields": known, "list": [1, 2]}
        state.write_text(json.dumps(contents[damage]) if damage in contents else state.read_text()[:20])
    resumed = trainer_for(tmp_path)
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_lgp") and r.levelname == "WARNING"]
    assert "measured anew" in warning
    assert resumed.state.global_step == 6 and resumed._lgp_steps == {"exact": 0, "predicted": 2}


def test_a_checkpoint_of_exact_training_is_gone_on_with_and_the_other_way_round(tmp_path: Path) -> None:
    for folder, first, second, steps in (("a", 1.0, 0.5, 2), ("b", 0.5, 1.0, 0)):
        trainer_for(tmp_path / folder, save_strategy="steps", save_steps=4, lgp_control_fraction=first).train()
        trainer = trainer_for(tmp_path / folder, lgp_control_fraction=second)
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4"))
        assert trainer.state.global_step == 6 and trainer._lgp_steps["predicted"] == steps
