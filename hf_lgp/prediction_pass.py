"""The prediction pass: head inputs of examples without a graph, over the backbone's own layers.

What a classifier on the class token reads does not depend on the other rows that leave the last block, so the queries, the
output projection and the MLP of those rows need not be computed. The blocks before it are walked layer by layer: nothing is
kept for a backward, the rows that the class path wants are noted on the way, and attention is computed as it is cheapest without
a graph. Where a block draws anything at random, the whole model has to run instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_block import AttentionBlock, BlockRows
from .block_weights import BlockWeights, affine
from .followed_rows import FollowedRows
from .row_notes import Backbone, RowNotes, compute_dtype, is_active

_SHORT_SEQUENCE = 128
"""Rows up to which explicit attention in bfloat16 beats the fused kernel on a CPU."""

_CPU_ROWS = 4096
"""Rows that go through the blocks together on a CPU."""


class PredictionPass:
    """A cheaper forward for one backbone.

    Args:
        backbone: The backbone, with a way to embed its inputs.
        path: The class path that is to note the rows on their way, if it is followed.
        skipped: Modules of the model that this pass does not call.
    """

    def __init__(self, backbone: Backbone, path: RowNotes | None, skipped: Iterable[nn.Module] = ()) -> None:
        self.backbone, self.path = backbone, path
        # What draws at random outside of the modules called here has its say only in a forward of the whole model.
        passed_by = [*skipped, *(dropout for block in backbone.blocks for dropout in block.dropouts)]
        self._random = [module for module in passed_by if hasattr(module, "p") or hasattr(module, "drop_prob")]

    def features(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Head input of the examples.

        Args:
            inputs: The model's inputs, without labels.

        Returns:
            Features, shape ``(b, D)``, or None where this pass would not be the model's own: then the whole model has to run.
        """
        norm = self.backbone.norm
        if any(map(is_active, self._random)) or any(block.attention_dropout() > 0.0 for block in self.backbone.blocks):
            return None
        hidden = None if self.backbone.embed is None else self.backbone.embed(inputs)
        if hidden is None:
            return None
        product_dtype = _product_dtype(hidden)
        rows = slice(0, len(hidden)) if self.path is None else self.path.armed
        parts, start, entering = _parts(hidden), rows.start, []
        blocks = range(len(self.backbone.blocks) - 1)
        weights = [self._weights(index, product_dtype) for index in blocks]
        for part in parts:
            if self.path is not None:
                self.path.arm(slice(start, start + len(part)))
            start += len(part)
            entering.append(self._before_last(part, weights))
        if self.path is not None:
            self.path.arm(rows)
        row = self._through_last(entering, rows).to(hidden.dtype)
        return row if norm is None else F.layer_norm(row, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _weights(self, index: int, dtype: torch.dtype) -> BlockWeights:
        return (
            BlockWeights(self.backbone.blocks[index], dtype) if self.path is None else self.path.weights(index, dtype)
        )

    def _before_last(self, hidden: Tensor, blocks: Sequence[BlockWeights]) -> BlockRows | None:
        """What the last block's class row needs, from the first block's input, shape ``(b, T, D)``; None if the path has noted it."""
        for index, weights in enumerate(blocks):
            if self.path is None:
                normalised = _normalise(hidden, weights.block.norm_before.eps)
            else:
                normalised = self.path.note(index, hidden)
            hidden = through_block(weights, hidden, normalised)
        if self.path is not None:
            self.path.note(len(blocks), hidden)
            return None
        rows = _normalise(hidden, self.backbone.blocks[-1].norm_before.eps).to(compute_dtype(hidden))
        return BlockRows(hidden[:, :1].to(torch.promote_types(hidden.dtype, torch.float32)), rows)

    def _through_last(self, parts: Sequence[BlockRows | None], examples: slice) -> Tensor:
        """The class row that leaves the last block, shape ``(b, D)``."""
        own = [part for part in parts if part is not None]
        if self.path is not None:
            rows = self.path.block_rows(len(self.backbone.blocks) - 1, examples)
        else:
            rows = BlockRows(torch.cat([part.entering for part in own]), torch.cat([part.rows for part in own]))
        weights = self._weights(len(self.backbone.blocks) - 1, rows.rows.dtype)
        leaving = FollowedRows(weights, rows, graph=False).leaving[:, 0]
        if self.path is not None:
            self.path.note_leaving(leaving)
        return leaving


def through_block(weights: BlockWeights, hidden: Tensor, normalised: Tensor) -> Tensor:
    """The output of a block that draws nothing at random, with as few operations as its forward needs.

    Args:
        weights: The block's weights.
        hidden: Rows that enter, shape ``(b, T, D)``.
        normalised: The same after the first norm without its affine map.
    """
    block, norm, dtype = weights.block, weights.block.norm_after, weights.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        together = affine(normalised.to(dtype), weights.together)
        widths = [layer.out_features for layer in (block.query, block.key, block.value)]
        heads = [part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in together.split(widths, -1)]
        attended = attend(*heads).transpose(1, 2).flatten(2)
        middle = _scaled(block, 0, affine(attended, weights.output)) + hidden
        gain, shift = norm.weight.to(middle.dtype), norm.bias.to(middle.dtype)
        expanded = affine(F.layer_norm(middle, gain.shape, gain, shift, norm.eps).to(dtype), weights.expand)
        return middle.add_(_scaled(block, 1, affine(block.activation(expanded), weights.contract)))


def _scaled(block: AttentionBlock, position: int, branch: Tensor) -> Tensor:
    return branch if block.scales is None else branch * block.scales[position]


def _normalise(hidden: Tensor, eps: float) -> Tensor:
    """A norm without affine map."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=eps)


def _parts(hidden: Tensor) -> Sequence[Tensor]:
    """Examples that go through the blocks together: on a CPU, few enough for their activations to stay in its cache."""
    if hidden.device.type != "cpu":
        return [hidden]
    examples, rows, _ = hidden.shape
    return hidden.tensor_split(min(examples, -(-examples * rows // _CPU_ROWS)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dot-product attention without a graph.

    Args:
        query: Queries, already scaled, shape ``(b, H, T, d)``.
        key: Keys, same shape.
        value: Values, shape ``(b, H, T, d')``.

    Returns:
        Attention outputs, shape ``(b, H, T, d')``.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT_SEQUENCE:
        return (query @ key.mT).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype in which linear layers compute now."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def prediction_pass(
    model: nn.Module, head: nn.Module, backbone: Backbone, path: RowNotes | None
) -> PredictionPass | None:
    """The prediction pass of a model made of nothing but its backbone's parts and a head, else None.

    Args:
        model: The user's model.
        head: Its classification head.
        backbone: Its backbone.
        path: The class path, if it is followed.
    """
    if backbone.embed is None:
        return None
    parts = [part for block in backbone.blocks for part in block.layers]
    known = [backbone.embeddings, *parts, head, *([] if backbone.norm is None else [backbone.norm])]
    parameters: set[Tensor] = {parameter for module in known for parameter in module.parameters()}
    parameters.update(scale for block in backbone.blocks for scale in block.scales or ())
    if any(parameter not in parameters for parameter in model.parameters()):
        return None  # an adapter, a second head: something this pass would run past
    called = {module for part in (backbone.embeddings, *parts) for module in part.modules()}
    return PredictionPass(backbone, path, [m for m in model.modules() if m not in called])
