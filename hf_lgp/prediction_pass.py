"""The prediction pass: head inputs of examples without a graph, with the last block run on the class row only.

What a classifier on the class token reads does not depend on the other rows that leave the last block, so the queries, the
output projection and the MLP of those rows need not be computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_block import BlockRows, FollowedRows
from .row_notes import Backbone, RowNotes, compute_dtype, is_active


class PredictionPass:
    """A cheaper forward for one backbone.

    Args:
        backbone: The backbone, with a way to run it up to its last block.
        path: The class path that is to note the rows on their way, if it is followed.
        skipped: Modules of the model that this pass does not call.
    """

    def __init__(self, backbone: Backbone, path: RowNotes | None, skipped: Iterable[nn.Module] = ()) -> None:
        self.backbone, self.path = backbone, path
        # Whatever draws at random outside of the modules run here has its say only in a forward of the whole model.
        self._random = [module for module in skipped if hasattr(module, "p") or hasattr(module, "drop_prob")]

    def features(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Head input of the examples.

        Args:
            inputs: The model's inputs, without labels.

        Returns:
            Features, shape ``(b, D)``, or None where this pass would not be the model's own: then the whole model has to run.
        """
        last, norm = self.backbone.blocks[-1], self.backbone.norm
        if any(is_active(module) for module in (*last.dropouts, *self._random)) or last.attention_dropout() > 0.0:
            return None
        hidden = None if self.backbone.until_last is None else self.backbone.until_last(inputs)
        if hidden is None:
            return None
        if self.path is not None:
            rows = self.path.note_last(hidden)
        else:
            width = hidden.shape[-1:]
            others = F.layer_norm(hidden[:, 1:], width, eps=last.norm_before.eps).to(compute_dtype(hidden))
            rows = BlockRows(hidden[:, :1].to(torch.promote_types(hidden.dtype, torch.float32)), others)
        leaving = FollowedRows(last, rows, graph=False).leaving[:, 0]
        if self.path is not None:
            self.path.note_leaving(leaving)
        leaving = leaving.to(hidden.dtype)
        if norm is None:
            return leaving
        return F.layer_norm(leaving, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


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
    if backbone.until_last is None:
        return None
    last = backbone.blocks[-1]
    parts = [
        last.norm_before,
        last.query,
        last.key,
        last.value,
        last.output,
        last.norm_after,
        last.expand,
        last.contract,
    ]
    run = [backbone.embeddings, *(block.module for block in backbone.blocks[:-1])]
    known = [*run, *parts, head, *([] if backbone.norm is None else [backbone.norm])]
    parameters = {parameter for module in known for parameter in module.parameters()}
    if any(parameter not in parameters for parameter in model.parameters()):
        return None  # an adapter, a second head: something this pass would run past
    called = {module for part in run for module in part.modules()}
    return PredictionPass(backbone, path, [m for m in model.modules() if m not in called])
