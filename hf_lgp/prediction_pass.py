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

from .attention_block import AttentionBlock, BlockRows, FollowedRows
from .row_notes import Backbone, RowNotes, compute_dtype, is_active

_SHORT_SEQUENCE = 128
"""Rows up to which explicit attention in bfloat16 beats the fused kernel on a CPU."""

_CPU_ROWS = 2048
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
        rows = slice(0, len(hidden)) if self.path is None else self.path.armed
        parts, start, leaving = _parts(hidden), rows.start, []
        for part in parts:
            if self.path is not None:
                self.path.arm(slice(start, start + len(part)))
            start += len(part)
            leaving.append(self._class_row(part))
        if self.path is not None:
            self.path.arm(rows)
        row = leaving[0] if len(leaving) == 1 else torch.cat(leaving)
        return row if norm is None else F.layer_norm(row, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _class_row(self, hidden: Tensor) -> Tensor:
        """The class row that leaves the last block, shape ``(b, D)``, from the first block's input."""
        *blocks, last = self.backbone.blocks
        for index, block in enumerate(blocks):
            if self.path is not None:
                self.path.note(index, hidden)
            hidden = _through(block, hidden)
        if self.path is not None:
            rows = self.path.note_last(hidden)
        else:
            width = hidden.shape[-1:]
            others = F.layer_norm(hidden[:, 1:], width, eps=last.norm_before.eps).to(compute_dtype(hidden))
            rows = BlockRows(hidden[:, :1].to(torch.promote_types(hidden.dtype, torch.float32)), others)
        leaving = FollowedRows(last, rows, graph=False).leaving[:, 0]
        if self.path is not None:
            self.path.note_leaving(leaving)
        return leaving.to(hidden.dtype)


def _parts(hidden: Tensor) -> Sequence[Tensor]:
    """Examples that go through the blocks together: on a CPU, few enough for their activations to stay in its cache."""
    if hidden.device.type != "cpu":
        return [hidden]
    examples, rows, _ = hidden.shape
    return hidden.tensor_split(min(examples, -(-examples * rows // _CPU_ROWS)))


def _through(block: AttentionBlock, hidden: Tensor) -> Tensor:
    """A whole block's forward, shape ``(b, T, D)``, of a block that draws nothing at random."""
    normalised = block.norm_before(hidden).to(_product_dtype(hidden))  # once, not in each projection
    query, key, value = (
        layer(normalised).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for layer in (block.query, block.key, block.value)
    )
    attended = attend(query, key, value, block.scaling).transpose(1, 2).flatten(2)
    attention = block.output(attended)
    middle = hidden + (attention if block.scales is None else attention * block.scales[0])
    expanded = block.activation(block.expand(block.norm_after(middle)))
    contracted = block.contract(expanded)
    return middle.add_(contracted if block.scales is None else contracted * block.scales[1])


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Scaled dot-product attention without a graph.

    Args:
        query: Queries, shape ``(b, H, T, d)``.
        key: Keys, same shape.
        value: Values, same shape.
        scaling: Factor of the scores.

    Returns:
        Attention outputs, shape ``(b, H, T, d)``.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= _SHORT_SEQUENCE:
        with torch.autocast("cpu", enabled=False):
            return (query * scaling @ key.mT).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)


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
