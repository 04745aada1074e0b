"""No step waits for the device, copies from pageable memory, mixes devices or saves random states: on a GPU that is simulated on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.measurement import GroupSpread
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows import walk as walk_module
from hf_lgp.rows.walk import RowBudget
from hf_lgp.session import Session
from hf_lgp.settings import LGPSettings

pytestmark = pytest.mark.device

PLANS = {
    "exact": StepPlan(),
    "first row": StepPlan(first_row=True),
    "predicted": StepPlan(0.25, first_row=True, seed=1),
    "all rows": StepPlan(0.5, seed=2),
    "measuring": StepPlan(1.0, measure=8, first_row=True, seed=3),
    "predicted and measuring": StepPlan(0.5, measure=4, first_row=True, seed=4),
}


def on_device(cuda: Any, dropout: float = 0.0) -> tuple[Any, RowWalk, dict[str, Any]]:
    """A ViT on the device, its verified stack, and a batch."""
    model = tiny_vit(torch.float32, dropout=dropout, num_hidden_layers=3)
    batch = TinyImages(16, dtype=torch.float32).batch(0, 16)
    few = {name: value[:4] for name, value in batch.items()}
    method = row_walk(
        model,
        lambda n: model(**{k: v[:n] for k, v in few.items()}).loss,
        4,
        RowBudget(1, 1),
        intercepted_attention,
        False,
    )
    return cuda.moved(model.train()), method, {name: cuda.OnCuda(value) for name, value in batch.items()}


def step(
    model: Any, method: RowWalk, batch: Any, plan: StepPlan, half: torch.dtype | None, scaler: Any = None
) -> list[GroupSpread]:
    spreads: list[GroupSpread] = []
    with method.splice(plan, spreads.append):
        with torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None):
            loss = model(**batch).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
    return spreads


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", list(PLANS))
def test_a_step_only_launches(cuda: Any, kind: str, dropout: float, half: torch.dtype | None) -> None:
    model, method, batch = on_device(cuda, dropout)
    plan = PLANS[kind]
    step(model, method, batch, plan, half)  # what is made once
    cuda.SEEN.clear()
    cuda.LAUNCHES[0] = 0
    for _ in range(2):  # accumulated
        spreads = step(model, method, batch, plan, half)
    assert cuda.SEEN == [] and cuda.LAUNCHES[0] > 100
    assert len(spreads) == (1 if plan.measure else 0)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_step_with_a_scaled_loss_only_launches(cuda: Any) -> None:
    model, method, batch = on_device(cuda)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler._scale = cuda.OnCuda(torch.tensor(2.0**10))
    scaler._growth_tracker = cuda.OnCuda(torch.tensor(0, dtype=torch.int32))
    step(model, method, batch, PLANS["predicted"], torch.float16, scaler)
    cuda.SEEN.clear()
    step(model, method, batch, PLANS["predicted"], torch.float16, scaler)
    assert cuda.SEEN == []


@pytest.mark.parametrize("fraction", [0.25, 0.0])
def test_a_run_decides_without_waiting(cuda: Any, fraction: float) -> None:
    model, method, batch = on_device(cuda)
    session = Session(LGPSettings(control_fraction=fraction, exact_steps=16), steps=400, device=cuda.CUDA)
    session.use(method, None, 0, 16)
    seen = set()
    for number in range(140):
        cuda.SEEN.clear()
        plan = session.plan(number, 1)
        with session.step(plan, 16, 16.0):
            model(**batch).loss.backward()
        seen.add((plan.fraction < 1.0, plan.measure > 0))
        # A control order is drawn on the host, and copied from pinned memory.
        assert [event for event in cuda.SEEN if "hf_lgp" in event.place] == [], f"step {number}: {plan}"
    assert seen >= ({(True, False), (True, True)} if fraction else {(False, False), (False, True)})
    assert session.controller.measurements > 0


def test_a_wait_in_the_walk_is_seen(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method, batch = on_device(cuda)
    usual = walk_module.row_weights

    def waiting(member: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        assert asked.sum().item() >= 0.0
        return usual(member, asked)

    monkeypatch.setattr(walk_module, "row_weights", waiting)
    cuda.SEEN.clear()
    step(model, method, batch, PLANS["predicted"], None)
    assert {(event.kind, event.operation) for event in cuda.SEEN} == {("wait", "_local_scalar_dense")}
