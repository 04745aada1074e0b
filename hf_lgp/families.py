"""Backbones with a class-token path, recognised by their parts.

A family is a small table of names: where a block keeps its norms, projections and MLP. Whether the head really reads the class
row that the names suggest is checked against the running model (:meth:`~hf_lgp.engine.LGPEngine.verify_backbone`), so an
unknown variant falls back to the ridge regression instead of giving a wrong path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .attention_block import AttentionBlock
from .row_notes import Backbone


@dataclass(frozen=True)
class BlockNames:
    """Attribute paths of the parts of one family's block.

    ``plain`` blocks map hidden states to hidden states alone, and their head reads nothing but the class row.
    """

    norm_before: str
    norm_after: str
    query: str = "attention.q_proj"
    key: str = "attention.k_proj"
    value: str = "attention.v_proj"
    output: str = "attention.o_proj"
    heads: str = "attention.num_attention_heads"
    attention_dropout: str = "attention.attention_dropout"
    expand: str = "mlp.fc1"
    activation: str = "mlp.activation_fn"
    contract: str = "mlp.fc2"
    scales: tuple[str, str] | None = None
    dropouts: tuple[str, ...] = ("dropout",)
    plain: bool = False


FAMILIES: dict[str, BlockNames] = {
    "ViT, DeiT": BlockNames("layernorm_before", "layernorm_after", plain=True),
    "BEiT": BlockNames(
        "layernorm_before", "layernorm_after", scales=("lambda_1", "lambda_2"), dropouts=("dropout", "drop_path")
    ),
    "Dinov2": BlockNames(
        "norm1", "norm2", scales=("layer_scale1.lambda1", "layer_scale2.lambda1"), dropouts=("drop_path",)
    ),
}
"""Block families, tried in order; a new one is one entry."""


def _part(module: nn.Module, path: str) -> Any:
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def describe_block(module: nn.Module) -> AttentionBlock | None:
    """The parts of a pre-norm attention block of a known family, or None."""
    for names in FAMILIES.values():
        linear = {
            n: _part(module, getattr(names, n)) for n in ("query", "key", "value", "output", "expand", "contract")
        }
        norms = {n: _part(module, getattr(names, n)) for n in ("norm_before", "norm_after")}
        heads, activation = _part(module, names.heads), _part(module, names.activation)
        scales = None if names.scales is None else tuple(_part(module, path) for path in names.scales)
        has_scales = any(hasattr(module, name) for name in ("lambda_1", "layer_scale1"))
        if (
            any(type(m) is not nn.Linear for m in linear.values())
            or any(type(m) is not nn.LayerNorm or m.weight is None or m.bias is None for m in norms.values())
            or not isinstance(heads, int)
            or not callable(activation)
            or has_scales != (scales is not None)
            or linear["key"].out_features != linear["query"].out_features
        ):
            continue
        return AttentionBlock(
            module=module,
            **norms,
            **linear,
            activation=activation,
            heads=heads,
            scaling=(linear["query"].out_features // heads) ** -0.5,
            scales=scales if scales is not None and all(isinstance(s, Tensor) for s in scales) else None,
            dropouts=tuple(m for path in names.dropouts if isinstance(m := _part(module, path), nn.Module)),
            attention_dropout=_attention_dropout(module, names.attention_dropout),
            plain=names.plain,
        )
    return None


def _attention_dropout(module: nn.Module, path: str) -> Callable[[], float]:
    return lambda: float(_part(module, path) or 0.0) if module.training else 0.0


def find_backbone(model: nn.Module) -> Backbone | None:
    """The backbone of ``model`` if it is of a known family: a stack of blocks beside ``embeddings`` and a final norm."""
    stacks: list[tuple[str, list[AttentionBlock]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            described = [block for child in module if (block := describe_block(child)) is not None]
            if len(described) == len(module):
                stacks.append((name, described))
    if len(stacks) != 1:
        return None
    name, blocks = stacks[0]
    owner = next(
        (
            module
            for module in (model.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1))
            if isinstance(getattr(module, "embeddings", None), nn.Module)
        ),
        None,
    )
    if owner is None:
        return None
    embeddings, norm = owner.embeddings, getattr(owner, "layernorm", None)
    assert isinstance(embeddings, nn.Module)
    convolution = next((m for m in embeddings.modules() if isinstance(m, nn.Conv2d)), None)
    tokens = [getattr(embeddings, n, None) for n in ("cls_token", "distillation_token")]
    positions = getattr(embeddings, "position_embeddings", None)
    if not isinstance(tokens[0], nn.Parameter):
        return None
    return Backbone(
        blocks=blocks,
        norm=norm if type(norm) is nn.LayerNorm else None,
        patches=convolution,
        tokens=[token for token in tokens if isinstance(token, nn.Parameter)],
        positions=positions if isinstance(positions, nn.Parameter) else None,
        embeddings=embeddings,
        embed=_embed(embeddings, convolution) if blocks[0].plain else None,
    )


def _embed(embeddings: nn.Module, convolution: nn.Conv2d | None) -> Callable[[Mapping[str, Any]], Tensor | None]:
    known = {"pixel_values", "interpolate_pos_encoding"}

    def run(inputs: Mapping[str, Any]) -> Tensor | None:
        if not set(inputs) <= known or convolution is None:
            return None
        pixels = inputs["pixel_values"].to(convolution.weight.dtype)
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        hidden: Tensor = embeddings(pixels, **others)
        return hidden

    return run
