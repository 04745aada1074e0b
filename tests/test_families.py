"""Which models get a class-token path, and from which of their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLASS_TOKEN_FAMILIES, WIDTH, TinyImages, tiny_bert, tiny_classifier, tiny_convnext, tiny_swin
from torch import Tensor, nn

from hf_lgp.engine import LGPEngine
from hf_lgp.families import describe_block, find_backbone
from hf_lgp.settings import LGPSettings

families = pytest.mark.parametrize("family", CLASS_TOKEN_FAMILIES)
EXAMPLES = 4


def blocks_of(model: Any) -> nn.ModuleList:
    """The model's stack of blocks."""
    (stack,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "attention"))
    return stack


@families
def test_the_parts_of_every_family_are_found(family: str) -> None:
    model = tiny_classifier(family, num_hidden_layers=3)
    backbone, trunk = find_backbone(model), model.base_model
    assert backbone is not None
    assert backbone.norm is trunk.layernorm
    assert backbone.patches is trunk.embeddings.patch_embeddings.projection
    assert backbone.positions is trunk.embeddings.position_embeddings
    names = ["cls_token", "distillation_token"] if family == "deit" else ["cls_token"]
    assert [id(token) for token in backbone.tokens] == [id(getattr(trunk.embeddings, name)) for name in names]
    assert (backbone.embed is not None) is (family in ("vit", "deit"))
    stack = blocks_of(model)
    assert len(backbone.blocks) == len(stack) == 3
    for block, module in zip(backbone.blocks, stack, strict=True):
        attention = module.attention
        assert block.module is module
        assert (block.query, block.key, block.value) == (attention.q_proj, attention.k_proj, attention.v_proj)
        assert (block.output, block.expand, block.contract) == (attention.o_proj, module.mlp.fc1, module.mlp.fc2)
        norms = ("norm1", "norm2") if family == "dinov2" else ("layernorm_before", "layernorm_after")
        assert (block.norm_before, block.norm_after) == tuple(getattr(module, name) for name in norms)
        assert block.heads == 2 and block.scaling == pytest.approx((WIDTH / 2) ** -0.5)
        rows = torch.randn(4)
        assert torch.equal(block.activation(rows), nn.functional.gelu(rows))


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("vit", None),
        ("deit", None),
        ("beit", "lambda_1 lambda_2"),
        ("dinov2", "layer_scale1.lambda1 layer_scale2.lambda1"),
    ],
)
def test_layer_scales_are_found_where_there_are_some(family: str, paths: str | None) -> None:
    model = tiny_classifier(family)
    block = describe_block(blocks_of(model)[0])
    assert block is not None
    if paths is None:
        assert block.scales is None
    else:
        assert block.scales is not None
        parameters = dict(blocks_of(model)[0].named_parameters())
        for scale, path in zip(block.scales, paths.split(), strict=True):
            assert scale is parameters[path]


def test_beit_without_layer_scale_and_position_table() -> None:
    overrides = {"layer_scale_init_value": 0.0, "use_absolute_position_embeddings": False}
    backbone = find_backbone(tiny_classifier("beit", **overrides))
    assert backbone is not None
    assert backbone.positions is None and backbone.blocks[0].scales is None


@families
def test_attention_dropout_counts_in_training_only(family: str) -> None:
    model = tiny_classifier(family, attention_probs_dropout_prob=0.25)
    backbone = find_backbone(model)
    assert backbone is not None
    for training, rate in ((True, 0.25), (False, 0.0)):
        model.train(training)
        assert backbone.blocks[0].attention_dropout() == rate


def vit_with(change: str) -> nn.Module:
    model = tiny_classifier("vit")
    block = model.vit.layers[1]
    if change == "adapted query":
        block.attention.q_proj = Adapted(WIDTH, WIDTH).double()
    elif change == "adapted MLP":
        block.mlp.fc2 = Adapted(12, WIDTH).double()
    elif change == "other norm":
        block.layernorm_after = nn.RMSNorm(WIDTH).double()
    elif change == "norm without affine map":
        block.layernorm_before = nn.LayerNorm(WIDTH, elementwise_affine=False).double()
    elif change == "no class token":
        model.vit.embeddings.cls_token = None
    elif change == "no blocks":
        model.vit.layers = nn.ModuleList()
    return model


class Adapted(nn.Linear):
    """A linear layer whose forward adds something of its own, as adapters do."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + rows.mean()


OTHERS = {
    "Swin": tiny_swin,
    "ConvNext": tiny_convnext,
    "BERT": tiny_bert,
    "Dinov2 with a gated MLP": lambda: tiny_classifier("dinov2", use_swiglu_ffn=True),
    "two backbones": lambda: nn.ModuleDict({"one": tiny_classifier("vit"), "other": tiny_classifier("deit")}),
    "no attention at all": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
    **{
        f"ViT, {change}": lambda change=change: vit_with(change)
        for change in (
            "adapted query",
            "adapted MLP",
            "other norm",
            "norm without affine map",
            "no class token",
            "no blocks",
        )
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_have_no_class_path(name: str) -> None:
    assert find_backbone(OTHERS[name]()) is None


# -- verification on the running model -------------------------------------------------------------------------------------


def engine_of(model: Any, **settings: Any) -> LGPEngine:
    return LGPEngine(model, model.classifier, LGPSettings(rank=2, **settings), torch.device("cpu"))


def verify(engine: LGPEngine, model: Any) -> bool:
    inputs = {"pixel_values": TinyImages(EXAMPLES).pixels}
    return engine.verify_backbone(inputs, lambda: model(**inputs), EXAMPLES)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@families
def test_the_engine_keeps_a_verified_path(family: str) -> None:
    model = tiny_classifier(family)
    before = hooks_of(model)
    engine = engine_of(model)
    assert verify(engine, model)
    assert engine.path is not None
    assert (engine.shortcut is not None) is (family in ("vit", "deit"))
    engine.close()
    assert hooks_of(model) == before


@pytest.mark.parametrize("rates", [{"hidden_dropout_prob": 0.4}, {"drop_path_rate": 0.6}])
def test_random_branches_do_not_spoil_the_verification(rates: dict[str, float]) -> None:
    for family in ("beit", "dinov2"):
        model = tiny_classifier(family, **rates).train()
        assert verify(engine_of(model), model)


def test_a_mean_pooling_head_is_found_out() -> None:
    model = tiny_classifier("beit", use_mean_pooling=True)
    backbone = find_backbone(model)
    assert backbone is not None and backbone.norm is None
    without = engine_of(model, class_path=False)
    own_hooks = hooks_of(model)
    without.close()
    engine = engine_of(model)
    assert engine.path is not None and hooks_of(model) > own_hooks
    assert not verify(engine, model)
    assert engine.path is None
    assert hooks_of(model) == own_hooks, "the path's hooks are gone, the engine's own remain"
    assert not verify(engine, model), "nothing is left to verify"


def test_a_model_that_changes_the_class_row_before_the_head_is_found_out() -> None:
    model = tiny_classifier("vit")
    model.vit.layernorm.register_forward_hook(lambda _, args, output: output.flip(-1))
    engine = engine_of(model)
    assert not verify(engine, model) and engine.path is None


def test_a_prediction_pass_that_is_not_the_models_own_is_given_up() -> None:
    model = tiny_classifier("vit")
    model.vit.layers[1].mlp.register_forward_hook(lambda _, args, output: -output)  # the pass runs past this module
    engine = engine_of(model)
    assert engine.path is not None and engine.shortcut is not None
    assert verify(engine, model)
    assert engine.path is not None and engine.shortcut is None


def test_the_setting_turns_the_path_off() -> None:
    engine = engine_of(tiny_classifier("vit"), class_path=False)
    assert engine.path is None
