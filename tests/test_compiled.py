"""``torch_compile=True``: exact steps run the compiled model, predicted ones their blocks, compiled once for all that are alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch.nn.utils import prune

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows.compiled import Compiled
from hf_lgp.rows.leaves import Run, run_eagerly
from hf_lgp.rows.walk import RowBudget
from hf_lgp.session import Session


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder: Path, compiled: bool, steps: int = 8, images: int = 48, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None,
        **settings,
    )
    trainer = LGPTrainer(tiny_vit(), arguments, train_dataset=TinyImages(images))
    trainer.train()
    return trainer


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same_run(one: LGPTrainer, other: LGPTrainer) -> None:
    for name, value in one.model.state_dict().items():
        if "k_proj.bias" not in name:  # no gradient but rounding, which Adam scales to full steps
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)
    losses, others = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, other))
    assert len(losses) == one.state.global_step and losses == pytest.approx(others, rel=1e-5)


def test_exact_steps_run_the_compiled_model(tmp_path: Path) -> None:
    settings = {"lgp_control_fraction": 0.0, "lgp_exact_steps": 8}
    eager, compiled = (trained(tmp_path, flag, **settings) for flag in (False, True))
    assert eager._lgp_steps == compiled._lgp_steps == {"exact": 8, "predicted": 0} and graphs() > 0
    assert_same_run(eager, compiled)


def test_predicted_steps_run_compiled_blocks_that_are_alike_as_one(tmp_path: Path) -> None:
    """Two hundred steps with an incomplete last batch in every epoch: two graphs of a kind at most, none of them compiled again."""
    settings = {"lgp_control_fraction": 0.5, "steps": 200, "images": 44}
    eager, compiled = (trained(tmp_path, flag, **settings) for flag in (False, True))
    assert eager._lgp_steps == compiled._lgp_steps == {"exact": 0, "predicted": 200}
    assert_same_run(eager, compiled)
    method = compiled._lgp.method if compiled._lgp is not None else None
    assert isinstance(method, RowWalk) and isinstance(method.how.run, Compiled)
    assert method.how.run.graphs == {"others": 2, "control": 2, "walk of 5 rows": 2}
    assert graphs() == 6 and not torch._dynamo.utils.counters["recompiles"]


@pytest.mark.parametrize("alike", [True, False])
def test_blocks_that_differ_have_graphs_of_their_own(alike: bool) -> None:
    model, batch = tiny_vit(num_hidden_layers=3), TinyImages(8).batch(0, 8)
    if not alike:
        model.vit.layers[0].layernorm_after.eps = 1e-3
    run = Compiled("aot_eager")
    found = [gradients(model, batch, how) for how in (run_eagerly, run)]
    assert run.graphs == dict.fromkeys(("others", "control", "walk of 3 rows"), 1 if alike else 2)
    torch.testing.assert_close(*found)


class Waits(torch.nn.Module):
    """Looks at what passes through it."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * (2.0 if rows.sum().item() > 1e9 else 1.0)


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return (4 * rows).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Rounds(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return Straight.apply(rows)


@pytest.mark.parametrize(("what", "kinds"), [(Waits, set()), (Rounds, {"others", "walk of 3 rows"})])
def test_what_a_graph_would_not_have_runs_as_it_is(
    what: type[torch.nn.Module], kinds: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = tiny_vit(), TinyImages(8).batch(0, 8)
    for layer in model.vit.layers:
        layer.mlp.fc2 = torch.nn.Sequential(layer.mlp.fc2, what())
    run = Compiled("aot_eager")
    found = [gradients(model, batch, how) for how in (run_eagerly, run)]
    assert set(run.graphs) == kinds and "Blocks run uncompiled as control" in caplog.text
    torch.testing.assert_close(*found)


def test_what_cannot_be_traced_is_not_tried_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    model, run = tiny_vit(num_hidden_layers=3), Compiled("aot_eager")
    for layer in model.vit.layers:
        layer.mlp.fc2 = torch.nn.Sequential(layer.mlp.fc2, Waits())
    for size in (6, 8, 10):
        gradients(model, TinyImages(size).batch(0, size), run)
    assert caplog.text.count("Blocks run uncompiled as control") == 2


def test_what_changes_between_steps_is_no_part_of_a_graph() -> None:
    model, batch = tiny_vit(num_hidden_layers=3), TinyImages(8).batch(0, 8)
    run = Compiled("aot_eager")
    gradients(model, batch, run)
    assert run.graphs["control"] == 1
    for layer in model.vit.layers:
        layer.layernorm_after.eps = 0.1
    prune.l1_unstructured(model.vit.layers[0].mlp.fc1, "weight", 0.5)
    torch.testing.assert_close(gradients(model, batch, run), gradients(model, batch, run_eagerly))


@pytest.mark.slow
def test_inductor_gives_the_same_gradients() -> None:
    model, batch = tiny_vit(), TinyImages(8).batch(0, 8)
    run = Compiled("inductor")
    found = [gradients(model, batch, how) for how in (run_eagerly, run)]
    assert run.graphs == {"others": 1, "control": 1, "walk of 3 rows": 1}
    torch.testing.assert_close(*found)


def gradients(model: Any, batch: dict[str, torch.Tensor], run: Run) -> dict[str, torch.Tensor]:
    """Of a step with predictions, once everything that is to be compiled was."""

    def loss(count: int) -> torch.Tensor:
        return model(**{name: value[:count] for name, value in batch.items()}).loss

    method = row_walk(model.train(), loss, 4, RowBudget(1, 1), intercepted_attention, False, run)
    for _ in range(10):
        model.zero_grad()
        with method.splice(StepPlan(0.5, first_row=True, seed=1), lambda _: None):
            loss(8).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in name}


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
    assert_same_run(*runs)
