"""Kernel launches of a step, counted on the simulated GPU: what a launch-bound machine pays, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyImages, tiny_vit

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import row_walk
from hf_lgp.rows.walk import RowBudget

pytestmark = pytest.mark.device

MOST = {
    "plain": (StepPlan(), 1000),
    "predicted": (StepPlan(0.25, first_row=True, seed=1), 2000),
    # Some 400 of them are the groups' attention in a loop: the CPU's, unlike a GPU's, cannot be vectorised.
    "predicted and measuring": (StepPlan(0.25, measure=8, first_row=True, seed=1), 5210),
}


def fused(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Attention in one launch, as a GPU has it."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@pytest.mark.parametrize("kind", list(MOST))
def test_a_step_of_twelve_blocks_has_few_launches(cuda: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, most = MOST[kind]
    model = tiny_vit(torch.float32, num_hidden_layers=12, attn_implementation="sdpa")
    batch = TinyImages(32, dtype=torch.float32).batch(0, 32)
    budget = RowBudget(2, 2)
    method = row_walk(
        model, lambda n: model(**{k: v[:n] for k, v in batch.items()}).loss, 4, budget, intercepted_attention, False
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    model, batch = cuda.moved(model.train()), {name: cuda.OnCuda(value) for name, value in batch.items()}
    counts = []
    for _ in range(2):
        before = cuda.LAUNCHES[0]
        with method.splice(plan, lambda _: None):
            model(**batch).loss.backward()
        counts.append(cuda.LAUNCHES[0] - before)
    print(f"{kind}: {counts[1]} launches")
    assert 0 < counts[1] <= most
