"""Models of several stacks, and heads on every token: the mean over all control draws is the exact gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from architectures import EXAMPLES
from draws import CONTROLS, every_draw
from torch import Tensor

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import row_walk
from hf_lgp.rows.walk import RowBudget

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, 20, (EXAMPLES, 7), generator=DRAW)
MASK = (torch.arange(7) < torch.tensor([7, 4, 6, 3])[:, None]).long()
PIXELS = torch.randn(EXAMPLES, 3, 8, 8, generator=DRAW, dtype=torch.float64)


def both_towers() -> tuple[Any, Callable[[Any, int], Tensor]]:
    """CLIP, images and texts drawn towards each other: every example's loss depends on all others."""
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 7, "eos_token_id": 2, "bos_token_id": 1}
    model = t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))

    def loss(model: Any, n: int) -> Tensor:
        images_and_texts = {"pixel_values": PIXELS[:n], "input_ids": TOKENS[:n], "attention_mask": MASK[:n]}
        found: Tensor = model(**images_and_texts, return_loss=True).loss
        return found

    return model, loss


def every_token() -> tuple[Any, Callable[[Any, int], Tensor]]:
    model = t.BertForTokenClassification(t.BertConfig(vocab_size=20, **SIZES, **STILL, num_labels=3))
    labels = torch.where(MASK.bool(), TOKENS % 3, -100)
    return model, lambda model, n: model(TOKENS[:n], MASK[:n], labels=labels[:n]).loss


def next_token() -> tuple[Any, Callable[[Any, int], Tensor]]:
    config = t.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return t.GPT2LMHeadModel(config), lambda model, n: model(TOKENS[:n], labels=TOKENS[:n]).loss


def encoder_and_decoder() -> tuple[Any, Callable[[Any, int], Tensor]]:
    """The decoder's blocks call attention twice: they are exact, the encoder's are predicted."""
    ffn = {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "use_cache": False}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
    config = t.BartConfig(d_model=8, encoder_layers=2, decoder_layers=2, **ffn, **still, **tokens)
    return t.BartForConditionalGeneration(config), lambda model, n: model(TOKENS[:n], MASK[:n], labels=TOKENS[:n]).loss


@pytest.mark.parametrize(
    ("build", "stacks"), [(both_towers, 2), (every_token, 1), (next_token, 1), (encoder_and_decoder, 1)]
)
def test_it_is_unbiased(build: Any, stacks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, loss = build()
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(loss(model, EXAMPLES), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    method = row_walk(model, lambda n: loss(model, n), EXAMPLES, RowBudget(1, 1), intercepted_attention, half=False)
    assert len(method.stacks) == stacks
    exact, each = gradients(), []
    for _ in every_draw(stacks, monkeypatch):
        with method.splice(StepPlan(CONTROLS / EXAMPLES), lambda _: None):
            each.append(gradients())
    largest = max(float(g.norm()) for g in exact)
    assert max(float((g - e).norm()) for g, e in zip(each[0], exact, strict=True)) > 1e-4 * largest, "an estimate"
    for k, expected in enumerate(exact):
        mean = torch.stack([draw[k] for draw in each]).mean(0)
        assert float((mean - expected).norm()) <= 1e-10 * max(float(expected.norm()), 1e-3 * largest)
