"""Stacks of blocks: found, run in two streams, measured by groups, and left as they were."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EXAMPLES, inputs_of, model_of
from torch import Tensor, nn

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.measurement import GroupSpread
from hf_lgp.control.plan import StepPlan
from hf_lgp.rows.parts import UnknownBlock
from hf_lgp.rows.walk import HowToWalk, RowBudget
from hf_lgp.sealed import SpliceError
from hf_lgp.stack import Stack, find_stacks, spliced

HOW = HowToWalk(RowBudget(1, 1), intercepted_attention)
ONE_BY_ONE = replace(HOW, vectorized=False)


def stacks_of(name: str, model: Any, first_row: bool = False) -> list[Stack]:
    inputs = inputs_of(name)
    fewer = {key: value[:-1] for key, value in inputs.items()}
    found = find_stacks(model, lambda: model(**inputs), lambda: model(**fewer), intercepted_attention)
    return [replace(stack, first_row_only=first_row) for stack in found]


def gradients(model: Any, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        off = float((found[name] - gradient).norm())
        assert off <= 1e-10 * max(float(gradient.norm()), 1e-3 * largest), name


ROTATED = (False, True)
FOLDS = {**dict.fromkeys(("dinov3", "modernbert", "llama", "qwen3", "fused with norms", "gated"), ROTATED)}
"""Whether keys and values are affine in what attention reads, where not both are."""


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "lora" not in n])
def test_all_blocks_are_found_and_what_folds_folds(name: str) -> None:
    (stack,) = stacks_of(name, model_of(name).eval())
    assert len(stack.parts) == 3
    assert {(part.key is not None, part.value is not None) for part in stack.parts} == {FOLDS.get(name, (True, True))}
    last = name in ("bert", "bert mean", "own encoder, norms last")
    assert all((part.front is None) == last or (k == 0 and name == "modernbert") for k, part in enumerate(stack.parts))


@pytest.mark.parametrize("plan", [StepPlan(all_control=True), StepPlan(measure=3), StepPlan(first_row=True)])
@pytest.mark.parametrize("name", ["vit", "bert", "beit class token"])
@pytest.mark.parametrize("how", [HOW, ONE_BY_ONE])
def test_with_every_example_a_control_example_gradients_are_exact(name: str, plan: StepPlan, how: HowToWalk) -> None:
    if "beit" in name:
        how = ONE_BY_ONE  # its attention's bias has a gradient, which `vmap` cannot give
    model, inputs = model_of(name).eval(), inputs_of(name)
    expected = gradients(model, inputs)
    with spliced(stacks_of(name, model, first_row=True), plan, how):
        found = gradients(model, inputs)
    assert_close(found, expected)


@pytest.mark.parametrize("first_row", [False, True])
@pytest.mark.parametrize("groups", [2, 3])  # of five control examples
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_measuring_step_has_the_estimate_of_one_that_does_not_measure(
    name: str, groups: int, first_row: bool
) -> None:
    model, inputs, spreads = model_of(name).eval(), inputs_of(name, 10), list[GroupSpread]()
    stacks = stacks_of(name, model, first_row)
    estimates = []
    for measure, how in ((0, HOW), (groups, HOW), (groups, ONE_BY_ONE)):
        with spliced(stacks, StepPlan(0.5, measure, first_row, seed=3), how, spreads.append):
            estimates.append(gradients(model, inputs))
    assert_close(estimates[1], estimates[0])
    assert_close(estimates[2], estimates[0])
    one, other = spreads
    torch.testing.assert_close([one.residual, one.total], [other.residual, other.total])
    assert len(one.total) == 1 + sum(len(list(p.block.parameters())) for p in stacks[0].predicted_parts(first_row))


def test_what_is_measured_is_the_spread_of_the_groups_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prediction of zero the residual is the gradient, whose spread over groups of two is told by backwards of their own."""
    model, inputs, spreads = model_of("vit").eval(), inputs_of("vit", 6), list[GroupSpread]()
    monkeypatch.setattr("hf_lgp.rows.walk._walk_block", no_prediction)
    with spliced(stacks_of("vit", model), StepPlan(measure=3), HOW, spreads.append):
        gradients(model, inputs)
    each = [gradients(model, {k: v[g : g + 2] for k, v in inputs.items()}) for g in (0, 2, 4)]
    stacked = {n: torch.stack([one[n] / 3 for one in each]) for n in each[0] if ".layers." in n}
    expected = [float((t - t.mean(0)).square().sum()) for t in stacked.values()]
    (spread,) = spreads
    assert sorted(spread.total[:-1].tolist()) == pytest.approx(sorted(expected), rel=1e-4, abs=1e-12)
    torch.testing.assert_close(spread.residual, spread.total)


def no_prediction(parts: Any, notes: Any, weights: Tensor, arriving: Tensor, leaves: Any, *_: Any) -> Any:
    return torch.zeros_like(arriving), torch.zeros_like(notes.hidden), dict.fromkeys(leaves)


def test_a_tensor_whose_first_dimension_happens_to_be_the_batch_is_left_whole() -> None:
    """Two-dimensional tables of as many rows as there are examples are no batches."""
    model, inputs = model_of("bert").eval(), inputs_of("bert")
    layer, forward = model.bert.encoder.layer, type(model.bert.encoder.layer[0]).forward
    table, seen = torch.randn(EXAMPLES, 8, dtype=torch.float64), []

    class WithTable(type(layer[0])):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, table: Any = None, **kwargs: Any) -> Any:
            seen.append(table)
            return forward(self, hidden, *args, **kwargs)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, mask: Any = None, **kwargs: Any) -> Any:
            for block in self.layer:
                hidden = block(hidden, mask, table=table)
            return type(
                "Out", (), {"last_hidden_state": hidden, "past_key_values": None, "__getitem__": lambda s, i: hidden}
            )()

    for block in layer:
        block.__class__ = WithTable
    model.bert.encoder = Encoder()
    stacks = stacks_of("bert", model)
    assert stacks[0].unbatched == {"table"}
    seen.clear()
    with spliced(stacks, StepPlan(0.5), HOW):
        gradients(model, inputs)
    assert seen and all(t is table for t in seen)


def test_a_table_as_long_as_the_batch_is_not_cut_into_groups() -> None:
    """DINOv3's tables of rotations have an entry for each patch, here as many as there are examples."""
    model, inputs = model_of("dinov3").eval(), inputs_of("dinov3")
    expected = gradients(model, inputs)
    with spliced(stacks_of("dinov3", model), StepPlan(measure=2), ONE_BY_ONE):
        assert_close(gradients(model, inputs), expected)


def test_without_gradients_nothing_is_spliced() -> None:
    model, inputs = model_of("vit").eval(), inputs_of("vit")
    with torch.no_grad():
        expected = model(**inputs).logits
        with spliced(stacks_of("vit", model, True), StepPlan(0.5, first_row=True), HOW):
            found = model(**inputs).logits
    assert torch.equal(found, expected)


def test_a_model_is_as_it_was_afterwards_and_whenever_something_fails() -> None:
    model = model_of("vit").eval()
    stacks, before = stacks_of("vit", model, True), [(type(m), set(vars(m))) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), spliced(stacks, StepPlan(0.5, first_row=True), HOW):
        gradients(model, inputs_of("vit"))
        raise ZeroDivisionError
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


def loss_with(model: Any, inputs: Any, **options: Any) -> Tensor:
    out = model(**inputs, **options)
    return out.loss + out.hidden_states[1].square().mean()


def test_what_is_read_between_blocks_is_an_error() -> None:
    model, inputs = model_of("vit").eval(), inputs_of("vit")
    with spliced(stacks_of("vit", model), StepPlan(0.5), HOW), pytest.raises(SpliceError, match="read elsewhere"):
        loss_with(model, inputs, output_hidden_states=True)


def test_a_skipped_block_is_an_error() -> None:
    model, inputs = model_of("vit").eval(), inputs_of("vit")
    stacks = stacks_of("vit", model)
    del model.vit.layers[1]
    with spliced(stacks, StepPlan(0.5), HOW), pytest.raises(SpliceError, match="one after the other"):
        model(**inputs)


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda m: m.vit.layers.requires_grad_(False), "nothing in its blocks is trained"),
        (lambda m: setattr(m.vit.layers[0], "layernorm_after", nn.BatchNorm1d(5).double()), "BatchNorm"),
        (lambda m: setattr(m.vit, "layers", nn.ModuleList()), "calls attention neither by"),
    ],
)
def test_what_cannot_be_predicted_says_why(break_: Any, reason: str) -> None:
    model = model_of("vit").eval()
    break_(model)
    with pytest.raises(UnknownBlock, match=reason):
        stacks_of("vit", model)


def test_blocks_that_call_attention_twice_are_none() -> None:
    model = model_of("vit").eval()
    for block in model.vit.layers:
        block.second = copy.deepcopy(block.attention)
        block.register_forward_hook(lambda block, _, out: block.second(out)[0])
    with pytest.raises(UnknownBlock, match="no list of blocks each of which calls attention once"):
        stacks_of("vit", model)


def test_with_dropout_the_mean_over_many_draws_is_that_of_exact_steps() -> None:
    """z-scores of every tensor along the exact mean: dropout and control sets are drawn anew each time."""
    model, inputs = model_of("bert").train(), inputs_of("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    stacks, count = stacks_of("bert", model.eval(), True), 160
    model.train()
    names = [n for n, _ in model.named_parameters() if "key.bias" not in n]
    samples: dict[str, list[Tensor]] = {}
    for kind, plan in (("exact", StepPlan()), ("predicted", StepPlan(0.5, first_row=True))):
        sums = []
        for k in range(count):
            with spliced(stacks, replace(plan, seed=k), HOW):
                found = gradients(model, inputs)
            sums.append(
                torch.stack([found[n].flatten() @ torch.sin(torch.arange(found[n].numel()).double()) for n in names])
            )
        samples[kind] = sums
    one, other = (torch.stack(samples[kind]) for kind in ("exact", "predicted"))
    z = (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / count).sqrt()
    assert float(z.abs().max()) < 4.5 and 0.5 < float(z.std()) < 1.7  # those of one draw are alike


def test_what_dropout_takes_of_attention_takes_the_values_bias_along() -> None:
    """All of it, so that there is nothing random."""
    model, inputs = model_of("bert"), inputs_of("bert")
    for name, bias in model.named_parameters():
        if name.endswith("value.bias"):
            bias.data.normal_()
    stacks, found = stacks_of("bert", model.eval(), first_row=True), list[Any]()
    last = model.bert.encoder.layer[-1].attention.self.train()
    last.dropout.p = 1.0
    for plan in (StepPlan(), StepPlan(first_row=True)):
        with spliced(stacks, plan, HOW):
            found.append(gradients(model, inputs))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_in_front_of_keys_is_the_models_own_where_the_last_block_is_exact(p: float) -> None:
    """Such as that of an adapter: folding would leave it out."""
    pytest.importorskip("peft")
    model = model_of("vit with lora").train()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora" in name:
            module.p = p
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = nn.Dropout(p)
    stacks, inputs, losses = stacks_of("vit with lora", model.eval(), first_row=True), inputs_of("vit"), []
    model.train()
    for block in model.get_base_model().vit.layers[:-1]:
        block.eval()
    for seed in (0, 1):
        torch.manual_seed(seed)
        with spliced(stacks, StepPlan(first_row=True), HOW):
            losses.append(float(model(**inputs).loss))
    assert (losses[0] == losses[1]) == (p == 0.0)
