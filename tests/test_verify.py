"""The check before anything is predicted."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from architectures import inputs_of, model_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.batches import few_of
from hf_lgp.call import Call
from hf_lgp.methods import row_walk
from hf_lgp.rows.parts import UnknownBlock
from hf_lgp.rows.walk import RowBudget
from hf_lgp.verify import unrandom


def check(model: Any, loss: Any = None) -> Any:
    inputs = inputs_of("vit")
    loss = loss or (lambda few: model(**few).loss)
    return row_walk(
        model, lambda count: loss(few_of(inputs, count)), 4, RowBudget(1, 1), intercepted_attention, half=False
    )


def test_a_model_is_checked_and_left_as_it_was() -> None:
    model = model_of("vit").train()
    model.classifier.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    method = check(model)
    assert method.has_first_row and len(method.stacks) == 1
    assert model.training and not model.classifier.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_of_the_check_is_left_in_memory() -> None:
    gc.collect()
    gc.disable()
    try:
        check(model_of("vit"))
        assert not [each for each in gc.get_objects() if type(each) is Call]
    finally:
        gc.enable()


def test_the_last_block_is_run_in_full_where_more_than_its_first_row_is_read() -> None:
    model = model_of("vit").eval()

    def loss(few: Any) -> Tensor:
        return model.vit(few["pixel_values"]).last_hidden_state.mean(1).square().sum()

    assert not check(model, loss).has_first_row


def test_hooks_of_libraries_stay() -> None:
    model = model_of("vit").eval()
    model(**inputs_of("vit"), output_attentions=True)  # leaves hooks of transformers
    prune.identity(model.vit.layers[0].mlp.fc1, "weight")
    assert check(model).has_first_row


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_whoever_listens_in_the_blocks_would_not_be_told_of_all_examples(kind: str) -> None:
    model = model_of("vit").eval()
    getattr(model.vit.layers[0].mlp.fc1, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(UnknownBlock, match="a hook in its blocks, of a Linear"):
        check(model)


def test_examples_that_meet_in_the_blocks_are_found_out() -> None:
    model = model_of("vit").eval()
    mlp = model.vit.layers[1].mlp

    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, rows: Tensor) -> Tensor:
            return self.mlp(rows + rows.mean(0, keepdim=True))

    model.vit.layers[1].mlp = Meeting()
    with pytest.raises(UnknownBlock, match="independently"):
        check(model)


def test_they_are_found_out_before_the_head_has_learnt_to_read_them() -> None:
    """A new head may be zero: no loss depends on what comes before it."""
    model = model_of("vit").eval()
    nn.init.zeros_(model.classifier.weight)
    assert check(model).has_first_row
    attend = model.vit.layers[1].attention.forward
    model.vit.layers[1].attention.forward = lambda rows, *a, **k: attend(rows + rows.mean(0, keepdim=True), *a, **k)
    with pytest.raises(UnknownBlock):
        check(model)


def test_a_loss_that_is_made_of_gradients_is_found_out() -> None:
    """Of an adversary's step, an estimate is no estimate."""
    model = model_of("vit").eval()

    def loss(few: Any) -> Tensor:
        pixels = few["pixel_values"].clone().requires_grad_()
        clean = model(pixels, labels=few["labels"]).loss
        (slope,) = torch.autograd.grad(clean, pixels, retain_graph=True)
        return clean + model(pixels.detach() + 1e-6 * slope.sign(), labels=few["labels"]).loss

    with pytest.raises(UnknownBlock, match="made of gradients"):
        check(model, loss)


def test_a_stack_that_is_run_again_in_the_backward_is_found_out() -> None:
    """It would draw other control examples than in the forward."""
    model = model_of("vit").eval()
    encode = model.vit.encoder.forward if hasattr(model.vit, "encoder") else model.vit.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(encode, *args, use_reentrant=False, **kwargs)

    model.vit.forward = again
    with pytest.raises(UnknownBlock, match="run once more in the backward"):
        check(model)


def test_attention_weights_are_not_returned() -> None:
    model = model_of("vit").eval()
    model.set_attn_implementation("eager")
    with pytest.raises(UnknownBlock, match="output_attentions"):
        check(model, lambda few: model(**few, output_attentions=True).loss)


@pytest.mark.parametrize("before", [nn.Dropout(0.5), nn.Identity()])
def test_a_dropout_before_attention_meets_all_rows(before: nn.Module) -> None:
    model = model_of("fused").eval()
    last = model.blocks[-1]
    last.before = before

    def forward(x: Tensor) -> Tensor:
        x = x + last.attn(last.before(last.norm1(x)))
        return x + last.mlp(last.norm2(x))

    kind = type("WithDropout", (type(last),), {"forward": lambda self, x: forward(x)})
    last.__class__ = kind
    assert check(model, lambda few: model(**few)["loss"]).has_first_row == isinstance(before, nn.Identity)


class Infinite(nn.Module):
    """Has no finite gradient for few rows."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows * (rows.detach().new_tensor(1.0 if rows.shape[-2] > 3 else torch.inf))


def test_predictions_that_are_not_finite_are_found_out() -> None:
    model = model_of("vit").eval()
    mlp = model.vit.layers[1].mlp
    mlp.fc1 = nn.Sequential(mlp.fc1, Infinite())
    with pytest.raises(UnknownBlock, match="not finite"):
        check(model)


def test_a_loss_that_reads_between_blocks_is_found_out() -> None:
    model = model_of("vit").eval()

    def loss(few: Any) -> Tensor:
        out = model(**few, output_hidden_states=True)
        return out.loss + out.hidden_states[1].square().mean()

    with pytest.raises(UnknownBlock, match="read elsewhere"):
        check(model, loss)


def test_random_streams_are_as_they_were_and_the_same_inside() -> None:
    def draws() -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    torch.manual_seed(3)
    inside = []
    for _ in range(2):
        state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        with unrandom():
            inside.append(draws())
        assert torch.equal(torch.get_rng_state(), state[0])
        assert (np.random.get_state()[1] == state[1]).all() and random.getstate() == state[2]
        draws()
    assert inside[0] == inside[1]


def test_a_loss_that_is_differentiated_twice_is_found_out() -> None:
    model = model_of("vit").eval()
    model.set_attn_implementation("eager")  # the other has no second derivative

    def loss(few: Any) -> Tensor:
        out = model(**few).loss
        (slope,) = torch.autograd.grad(out, [model.classifier.weight], create_graph=True, retain_graph=True)
        (inner,) = torch.autograd.grad(out, [model.vit.embeddings.cls_token], create_graph=True)
        return out + slope.square().sum() + inner.square().sum()

    with pytest.raises(UnknownBlock, match="made of gradients"):
        check(model, loss)


class Counting(nn.Module):
    """Keeps a statistic of what passes through it in training."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.largest = torch.maximum(self.largest, rows.detach().abs().max())
        return self.inside(rows)


def test_blocks_that_keep_statistics_are_found_out_and_left_as_they_were() -> None:
    model = model_of("vit").eval()
    model.vit.layers[1].mlp = counting = Counting(model.vit.layers[1].mlp).eval()
    before = counting.largest
    with pytest.raises(UnknownBlock, match="keep statistics of what passes through them, `largest`"):
        check(model)
    assert counting.largest is before and float(before) == 0.0 and not counting.training


def test_an_error_in_the_spliced_model_is_a_reason_not_to_predict() -> None:
    model = model_of("vit").eval()
    forward, layer = type(model.vit.layers[0]).forward, model.vit.layers[0]

    class Fails(type(layer)):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(hidden) == 2:
                raise ValueError("two are too few")
            return forward(self, hidden, *args, **kwargs)

    layer.__class__ = Fails
    with pytest.raises(UnknownBlock, match="ValueError: two are too few"):
        check(model)
