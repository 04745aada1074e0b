"""Whole runs with an automatic control fraction, under a clock of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, hooks_of, tiny_vit
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.costs import OBSERVED, REHEARSED, REHEARSED_PART, Costs
from hf_lgp.engine import LGPEngine
from hf_lgp.plans import EXACT, Plan
from hf_lgp.stopwatch import Stopwatch

STEPS = 96


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What steps take, by kind; the real clock is not asked."""
    costs = {"exact": 1.0, "observed": 1.05, "predicted": 0.4, "rehearsed": 0.3}
    collect = Stopwatch.collect

    def told(label: Any) -> float:
        plan: Plan = label[0]
        kinds = {EXACT: "exact", OBSERVED: "observed", REHEARSED: "rehearsed", REHEARSED_PART: "rehearsed"}
        return costs[kinds.get(plan, "predicted")]

    def collected(self: Stopwatch, wait: bool = False) -> list[tuple[Any, float]]:
        return [(label, told(label)) for label, _ in collect(self)]

    monkeypatch.setattr(Stopwatch, "collect", collected)
    monkeypatch.setattr(Stopwatch, "least", lambda self, wanted: None)
    return costs


def run(
    folder: Path,
    data: Any = None,
    resume: Path | None = None,
    callbacks: Any = None,
    eval_dataset: Any = None,
    kind: type[LGPTrainer] = LGPTrainer,
    **settings: Any,
) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "logging_steps": 16,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "lgp_exact_steps": 0,
            "lgp_warmup_examples": 32,
            "lgp_window": 64,
            "lgp_rank": 4,
            **settings,
        },
    )
    model = tiny_vit(torch.float32)
    data = data or TinyImages(64, dtype=torch.float32)
    trainer = kind(model, arguments, train_dataset=data, eval_dataset=eval_dataset, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert hooks_of(model) == 0
    return trainer


def logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_cheap_predictions_are_used_and_the_ledger_tells(tmp_path: Path, seconds: dict[str, float]) -> None:
    trainer = run(tmp_path, lgp_variance_budget=0.0)
    assert trainer._lgp_steps["predicted"] > STEPS // 2
    last = logs(trainer)[-1]
    assert last["lgp_fraction"] in (0.125, 0.25, 0.5)
    assert last["lgp_cost"] == pytest.approx(0.4) and 0.4 <= last["lgp_price"] < 1.0
    assert last["lgp_kappa"] == pytest.approx((0.4 - last["lgp_fraction"]) / (1 - last["lgp_fraction"]), abs=1e-5)
    assert last["lgp_time_saved"] > 0
    units = 8 * 64  # entries of one micro-batch's images
    assert last["lgp_time_saved"] <= 0.6 * units * trainer._lgp_steps["predicted"]


def test_dear_predictions_are_tried_at_most_once(tmp_path: Path, seconds: dict[str, float]) -> None:
    seconds["predicted"] = 3.0
    trainer = run(tmp_path, max_steps=200)
    assert trainer._lgp_steps["predicted"] <= 33 * 3
    assert logs(trainer)[-1]["lgp_fraction"] == 1.0 and logs(trainer)[-1]["lgp_price"] == 1.0
    assert trainer._lgp_steps["exact"] + trainer._lgp_steps["predicted"] == 200


def test_exact_steps_of_an_automatic_run_are_plain_trainers_bit_for_bit(
    tmp_path: Path, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking whether predictions would pay changes nothing."""
    monkeypatch.setattr("hf_lgp.controller.choose", lambda current, *_: current)
    trainer = run(tmp_path)
    assert trainer._lgp_steps == {"exact": STEPS, "predicted": 0}
    assert logs(trainer)[-1]["lgp_rho2"] > 0, "it did look"
    plain = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    other = Trainer(tiny_vit(torch.float32), plain, train_dataset=TinyImages(64, dtype=torch.float32))
    other.train()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_the_first_steps_are_exact_whatever_the_price(tmp_path: Path, seconds: dict[str, float]) -> None:
    settings: dict[str, Any] = {"lgp_variance_budget": 0.0, "lgp_exact_steps": 20, "gradient_accumulation_steps": 2}
    trainer = run(tmp_path, max_steps=20, **settings)
    assert trainer._lgp_steps == {"exact": 40, "predicted": 0}
    assert {entry["lgp_window"] for entry in logs(trainer)} == {0.0}, "nothing was observed"
    trainer = run(tmp_path, max_steps=48, **settings)
    assert trainer._lgp_steps["exact"] >= 40 and trainer._lgp_steps["predicted"] > 20


def test_by_default_a_tenth_of_a_short_run_begins_exactly(
    tmp_path: Path, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, method in (("wait", LGPEngine.wait), ("begin", LGPEngine.begin)):

        def noted(*args: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(LGPEngine, name, noted)
    trainer = run(tmp_path, max_steps=120, lgp_exact_steps=None, lgp_variance_budget=0.0)
    assert calls.index("begin") == 12 and trainer._lgp_steps["predicted"] > 60


def test_where_predictions_alone_are_dear_nothing_is_learnt(
    tmp_path: Path, seconds: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    seconds["rehearsed"] = 1.1
    trainer = run(tmp_path)
    assert trainer._lgp_steps == {"exact": STEPS, "predicted": 0} and logs(trainer)[-1]["lgp_window"] == 0
    assert logs(trainer)[-1]["lgp_time_saved"] == pytest.approx(-2 * 2 * 1.25 * 1.1 * 8 * 64), (
        "two rehearsals of the whole and of a quarter, at two micro-batches"
    )
    assert "nothing was learnt to predict with" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_plan_bit_for_bit(tmp_path: Path, seconds: dict[str, float]) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 60, "lgp_variance_budget": 0.0}
    straight = run(tmp_path / "a", **settings)
    resumed = run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-60", **settings)
    assert straight._lgp_steps == resumed._lgp_steps and straight._lgp_steps["predicted"] > 30
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    mine, theirs = logs(straight)[-1], logs(resumed)[-1]
    assert {key: mine[key] for key in mine if key.startswith("lgp_")} == {
        key: theirs[key] for key in theirs if key.startswith("lgp_")
    }


def test_the_real_clock_serves_too(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    last = logs(trainer)[-1]
    assert trainer._lgp_steps["exact"] >= 4 + 3
    assert last["lgp_price"] <= 1.04 and last["lgp_cost"] > 0


class Unlearnable(TinyImages):
    """Labels that have nothing to do with the images."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "labels": torch.tensor(index * 7919 % 3)}


class SlowEvaluation(TinyImages):
    """Takes a thousand seconds an image, by the clock of the test."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__(4, dtype=torch.float32)
        self.clock = clock

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.clock[0] += 1000.0
        return super().__getitem__(index)


class Evaluates(TrainerCallback):
    """A callback that runs the model between steps."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % 3 == 0:
            with torch.no_grad():
                model(TinyImages(2, dtype=torch.float32)[0]["pixel_values"][None])
            self.clock[0] += 1000.0


class Logs(LGPTrainer):
    """Logs a figure of its own whenever it computes a loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.log({"figure": 1.0})
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("besides", ["callback", "evaluation", "log", "save"])
def test_what_is_done_besides_is_no_part_of_a_step(
    besides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, readings = [0.0], []

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    record = Costs.record

    def noted(self: Costs, plan: Plan, seconds: float) -> None:
        readings.append(seconds)
        record(self, plan, seconds)

    monkeypatch.setattr("hf_lgp.stopwatch.time.perf_counter", tick)
    monkeypatch.setattr(Costs, "record", noted)
    # By this clock all micro-batches take as long: without a rehearsal that finds it out, predictions are tried.
    monkeypatch.setattr("hf_lgp.controller.Controller.rehearses", lambda self, ready: False)
    settings: dict[str, Any] = {"lgp_variance_budget": 0.0}
    if besides == "evaluation":
        settings |= {"eval_dataset": SlowEvaluation(clock), "eval_strategy": "steps", "eval_steps": 3}
    if besides == "save":
        settings |= {"save_strategy": "steps", "save_steps": 3, "save_only_model": True, "save_total_limit": 1}
        save = LGPTrainer._save

        def slow(*args: Any, **kwargs: Any) -> None:
            clock[0] += 1000.0
            save(*args, **kwargs)

        monkeypatch.setattr(LGPTrainer, "_save", slow)
    callbacks = [Evaluates(clock)] if besides == "callback" else None
    trainer = run(tmp_path, callbacks=callbacks, kind=Logs if besides == "log" else LGPTrainer, **settings)
    assert trainer._lgp_steps["predicted"] > 0
    assert len(readings) > 20 and max(readings) < 1000.0 / (8 * 64)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_any_labels_and_accumulation(accumulation: int, tmp_path: Path, seconds: dict[str, float]) -> None:
    data = Unlearnable(64, dtype=torch.float32)
    trainer = run(tmp_path, data, gradient_accumulation_steps=accumulation, max_steps=STEPS // accumulation)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    # Eight micro-batches an epoch: of three steps with three each, the last has two.
    assert sum(trainer._lgp_steps.values()) == {1: 96, 3: 86}[accumulation]
