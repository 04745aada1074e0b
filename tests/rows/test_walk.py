"""The walk is exact where every row is followed by itself, and linear in what it starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EXAMPLES, inputs_of, model_of
from torch import Tensor

import hf_lgp.rows.walk
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.call import Call
from hf_lgp.control.plan import StepPlan
from hf_lgp.rows.leaves import leaves_of
from hf_lgp.rows.walk import HowToWalk, RowBudget, walk
from hf_lgp.stack import Stack, find_stacks, spliced


def walked(
    stack: Stack, notes: Any, delta: Tensor, budget: RowBudget, first: int = 0, needs_input: bool = True
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Gradients of the input and, by their identity, of the parameters."""
    leaves = leaves_of([part.block for part in stack.parts], None)
    sums: dict[int, Tensor] = {}
    how = HowToWalk(budget, intercepted_attention)
    for step in walk(stack.parts, notes, delta, leaves, how, first, needs_input):
        sums.update({key: g for key, g in step.own.items() if g is not None})
    return step.of_hidden, sums


def noted(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Stack, Call, Tensor]:
    """A stack, what a call of it noted, and its output."""
    inputs, made = inputs_of(name), []
    stack = find_stacks(model, lambda: model(**inputs), None, intercepted_attention)[-1]
    finish = Call.finish

    def kept(self: Call) -> Tensor:
        made.append((self, finish(self)))
        return made[-1][1]

    monkeypatch.setattr(Call, "finish", kept)
    with spliced([stack], StepPlan(all_control=True), HowToWalk(RowBudget(2, 1), intercepted_attention)):
        model(**inputs)
    return stack, *made[-1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_every_row_followed_the_walk_is_the_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "lora" in name:
        pytest.importorskip("peft")
    stack, call, out = noted(name, model_of(name).eval(), monkeypatch)
    delta, rows = torch.randn_like(out), out.shape[1]
    if (mask := inputs_of(name).get("attention_mask")) is not None:  # of padding nothing is asked
        delta = delta * mask[..., None]
    needs_input, parameters = call.h0.requires_grad, call.parameters
    expected = torch.autograd.grad(out, [call.h0] * needs_input + [*parameters.values()], delta, allow_unused=True)
    of_input, found = walked(stack, call.notes, delta, RowBudget(rows), call.first, needs_input)
    largest = max(float(g.norm()) for g in expected if g is not None)
    for one, other in zip([of_input] * needs_input + [found.get(key) for key in parameters], expected, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (one, other))
        assert float((a - b).norm()) <= 1e-9 * max(float(b.norm()), 1e-3 * largest)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_asked_of_one_row_alone_is_exact_in_the_last_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever row it is, and whatever the block does with each row by itself."""
    if "lora" in name:
        pytest.importorskip("peft")
    stack, call, out = noted(name, model_of(name).eval(), monkeypatch)
    delta = torch.zeros_like(out)
    delta[:, 2] = torch.randn_like(out[:, 2])
    last = {id(p): p for p in stack.parts[-1].block.parameters() if p.requires_grad}
    expected = torch.autograd.grad(out, list(last.values()), delta, allow_unused=True)
    _, found = walked(stack, call.notes, delta, RowBudget(1, 0), len(stack.parts) - 1, False)
    largest = max(float(g.norm()) for g in expected if g is not None)
    for key, exact in zip(last, expected, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (found.get(key), exact))
        assert float((a - b).norm()) <= 1e-9 * max(float(b.norm()), 1e-3 * largest)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_the_walk_treats_examples_by_themselves_and_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, call, out = noted(name, model_of(name).eval(), monkeypatch)
    delta, weights = torch.randn_like(out), torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=out.dtype)

    def predicted(notes: Any, delta: Tensor) -> list[Tensor]:
        found = walked(stack, notes, delta, RowBudget(1, 2))[1]
        return [found.get(key, torch.zeros_like(p)) for key, p in call.parameters.items()]

    together = predicted(call.notes, delta * weights[:, None, None])
    alone = [predicted([n.take(slice(i, i + 1)) for n in call.notes], delta[i : i + 1]) for i in range(EXAMPLES)]
    for k, whole in enumerate(together):
        torch.testing.assert_close(whole, sum(w * one[k] for w, one in zip(weights, alone, strict=True)))


def test_the_first_row_meets_the_dropout_it_met_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the class row alone asked, and nothing but it followed, the walk has the forward's own masks."""
    model = model_of("vit").train()
    for block in model.vit.layers:
        block.dropout.p = 0.5
    stack, call, out = noted("vit", model, monkeypatch)
    kept = call.notes[-1].stream.kept[0]
    assert len(kept) == 2 and set(torch.cat(kept).unique().tolist()) == {0.0, 2.0}
    delta = torch.zeros_like(out)
    delta[:, 0] = torch.randn(out[:, 0].shape, dtype=out.dtype)
    exact = torch.autograd.grad(out, list(call.parameters.values()), delta, allow_unused=True)
    _, found = walked(stack, call.notes, delta, RowBudget(1, 2))
    names = {id(p): n for n, p in model.named_parameters()}
    for key, b in zip(call.parameters, exact, strict=True):
        if "layers.2.mlp.fc2" in names[key]:  # only the class row has a gradient there
            torch.testing.assert_close(found[key], b)


def test_frozen_blocks_below_end_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("vit").eval().requires_grad_(False)
    model.vit.layers[2].requires_grad_(True)
    stack, call, out = noted("vit", model, monkeypatch)
    visited: list[Any] = []
    own = hf_lgp.rows.walk._walk_block
    monkeypatch.setattr(hf_lgp.rows.walk, "_walk_block", lambda p, *a: visited.append(p.block) or own(p, *a))
    delta = torch.randn_like(out)
    of_input, found = walked(stack, call.notes, delta, RowBudget(2), call.first, False)
    assert visited == [model.vit.layers[2]] and of_input is None
    assert found.keys() == call.parameters.keys()
