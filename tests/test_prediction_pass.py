"""When the shorter prediction pass may stand for the whole model, and when it must not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import WIDTH, TinyImages, tiny_classifier
from torch import Tensor, nn

from hf_lgp import block_weights
from hf_lgp.draws import private_randomness
from hf_lgp.engine import LGPEngine
from hf_lgp.settings import LGPSettings

EXAMPLES = 4
with_and_without_path = pytest.mark.parametrize("class_path", [True, False])


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": TinyImages(EXAMPLES).pixels}


def verified(model: Any, head: nn.Linear, class_path: bool) -> LGPEngine:
    """An engine after both verifications, as a trainer does them."""
    inputs = pixels()
    if next(model.parameters()).dtype != torch.float64:
        inputs = {name: value.to(next(model.parameters()).dtype) for name, value in inputs.items()}

    def seeded() -> AbstractContextManager[Any]:
        return private_randomness(torch.device("cpu"), 0)

    def forward() -> None:
        with seeded():
            model(**inputs)

    engine = LGPEngine(model, head, LGPSettings(rank=2, class_path=class_path), torch.device("cpu"))
    model.eval()
    engine.verify_backbone(inputs, forward, EXAMPLES)
    model.train()
    engine.verify_shortcut(inputs, forward, seeded)
    return engine


@with_and_without_path
def test_a_plain_classifier_keeps_it(class_path: bool) -> None:
    model = tiny_classifier("vit")
    assert verified(model, model.classifier, class_path).shortcut is not None


@with_and_without_path
def test_dropout_before_the_head_needs_the_whole_model(class_path: bool) -> None:
    model = tiny_classifier("vit")
    head = model.classifier
    model.classifier = nn.Sequential(nn.Dropout(0.5), head)
    engine = verified(model, head, class_path)
    assert engine.shortcut is not None, "in evaluation it would do"
    assert engine.shortcut.features(pixels()) is None
    model.eval()
    with torch.no_grad():
        assert engine.shortcut.features(pixels()) is not None


@with_and_without_path
def test_dropout_that_is_no_module_is_found_out(class_path: bool) -> None:
    model = tiny_classifier("vit")
    model.vit.register_forward_hook(
        lambda module, _, output: type(output)(
            last_hidden_state=F.dropout(output.last_hidden_state, 0.5, module.training)
        )
    )
    assert verified(model, model.classifier, class_path).shortcut is None


@with_and_without_path
def test_an_adapter_that_starts_at_zero_is_not_run_past(class_path: bool) -> None:
    model = tiny_classifier("vit")
    block = model.vit.layers[-1]
    block.adapter = nn.Linear(WIDTH, WIDTH).double()
    nn.init.zeros_(block.adapter.weight)
    nn.init.zeros_(block.adapter.bias)
    block.register_forward_hook(lambda module, _, output: output + module.adapter(output))
    assert verified(model, model.classifier, class_path).shortcut is None


@with_and_without_path
def test_a_head_on_more_than_the_class_row_gets_all_of_it(class_path: bool) -> None:
    model = tiny_classifier("vit")
    head = nn.Linear(2 * WIDTH, 3).double()
    model.classifier = head
    model.vit.register_forward_hook(
        lambda _, __, output: type(output)(
            last_hidden_state=torch.cat(
                [output.last_hidden_state, output.last_hidden_state.mean(1, keepdim=True).expand_as(output[0])], dim=-1
            )
        )
    )
    assert verified(model, head, class_path).shortcut is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@with_and_without_path
def test_a_model_in_half_precision(class_path: bool, dtype: torch.dtype) -> None:
    model = tiny_classifier("vit").to(dtype)
    engine = verified(model, model.classifier, class_path)
    assert engine.shortcut is not None
    inputs = {name: value.to(dtype) for name, value in pixels().items()}
    with torch.no_grad():
        features = engine.shortcut.features(inputs)
    assert features is not None and features.dtype == dtype


def test_giving_up_the_path_gives_the_regression_its_own_memory() -> None:
    model = tiny_classifier("beit", use_mean_pooling=True)
    engine = verified(model, model.classifier, True)
    other = verified(tiny_classifier("beit", use_mean_pooling=True), model.classifier, False)
    assert engine.path is None
    assert engine.predictor.memory == other.predictor.memory


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_affine_is_a_linear_layer(
    biased: bool, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without oneDNN's own bfloat16 layer, which not every processor has."""
    if not fused:
        monkeypatch.setattr(block_weights, "_LINEAR", None)
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 5, 24), (16, 24), (16,))
    )
    result = block_weights.affine(rows, (weight, bias if biased else None))
    expected = F.linear(rows.double(), weight.double(), bias.double() if biased else None)
    assert result.dtype == dtype
    # Sums of 24 products are rounded once, to the result's dtype.
    torch.testing.assert_close(
        result.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
