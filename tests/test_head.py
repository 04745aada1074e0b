"""Finding the classification head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import TinyImages, tiny_vit
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from hf_lgp.head import HeadNotFoundError, find_head, named_head


class TwoHeads(nn.Module):
    """Averages two heads, as distilled models do: neither is the one that makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        x = self.trunk(x)
        return SimpleNamespace(logits=(self.first(x) + self.second(x)) / 2)


def test_finds_the_classifier_of_a_vit_and_leaves_no_hook() -> None:
    model = tiny_vit()
    name, head = find_head(model, lambda: model(TinyImages(2).pixels))
    assert (name, head) == ("classifier", model.classifier)
    assert not any(module._forward_hooks for module in model.modules())


def test_two_heads_are_an_error_that_names_both_and_the_option() -> None:
    model = TwoHeads()
    with pytest.raises(HeadNotFoundError, match=r"first, second.*lgp_head"):
        find_head(model, lambda: model(torch.randn(2, 4)))


def test_outputs_without_logits_are_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(HeadNotFoundError, match="no `logits`"):
        find_head(model, lambda: {"loss": model(torch.randn(1, 2)).sum()})


def test_a_named_head_must_exist_and_be_linear() -> None:
    model = tiny_vit()

    def forward() -> object:
        return model(TinyImages(2).pixels)

    assert named_head(model, "classifier", forward) is model.classifier
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(HeadNotFoundError, match=r"does not exist.*classifier"):
        named_head(model, "score", forward)
    with pytest.raises(HeadNotFoundError, match="is a ViTModel"):
        named_head(model, "vit", forward)
    with pytest.raises(HeadNotFoundError, match="takes no part"):
        named_head(model, "classifier", lambda: None)
    with pytest.raises(HeadNotFoundError, match="one row per example"):
        named_head(model, "vit.layers.0.mlp.fc1", forward)


def test_a_head_over_tokens_is_refused() -> None:
    model = BertForTokenClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(HeadNotFoundError, match=r"\(2, 5, 2\).*label tokens.*lgp_control_fraction=1"):
        find_head(model, lambda: model(torch.zeros(2, 5, dtype=torch.long)))
