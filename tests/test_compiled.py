"""``torch_compile=True``: exact steps run the compiled model, predicted ones go their own way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.control.plan import StepPlan
from hf_lgp.session import Session


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder: Path, compiled: bool, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
        **settings,
    )
    trainer = LGPTrainer(tiny_vit(), arguments, train_dataset=TinyImages(48))
    trainer.train()
    return trainer


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.5, {"exact": 0, "predicted": 8}), (0.0, {"exact": 8, "predicted": 0})]
)
def test_the_trajectory_is_that_of_eager_training(fraction: float, steps: dict[str, int], tmp_path: Path) -> None:
    settings = {"lgp_control_fraction": fraction, "lgp_exact_steps": 8}
    eager, compiled = (trained(tmp_path, flag, **settings) for flag in (False, True))
    assert eager._lgp_steps == compiled._lgp_steps == steps
    assert (graphs() > 0) == (steps["exact"] > 0), "exact steps are compiled, predicted ones are not"
    for name, value in eager.model.state_dict().items():
        if "k_proj.bias" not in name:  # no gradient but rounding, which Adam scales to full steps
            torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)
    one, other = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (eager, compiled))
    assert len(one) == 8 and one == pytest.approx(other, rel=1e-5)


def test_compiled_steps_follow_predicted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are given up midway: the steps behind are compiled, and what is compiled knows nothing of a splice."""
    plan, step = Session.plan, LGPTrainer.training_step
    compiled: list[int] = []

    def first_four(self: Session, at: int, *args: Any) -> StepPlan:
        found = plan(self, at, *args)
        return found if at < 4 else StepPlan()

    def counting(self: LGPTrainer, *args: Any) -> torch.Tensor:
        loss = step(self, *args)
        compiled.append(graphs())
        return loss

    monkeypatch.setattr(Session, "plan", first_four)
    monkeypatch.setattr(LGPTrainer, "training_step", counting)
    runs = [trained(tmp_path, flag, lgp_control_fraction=0.5) for flag in (False, True)]
    assert compiled[:12] == [0] * 12 and compiled[12:] == [1] * 4
    for name, value in runs[0].model.state_dict().items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)
