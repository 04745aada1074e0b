"""The prediction pass: head inputs of examples without a graph, with the last block run on the class row only.

What a classifier on the class token reads does not depend on the other rows that leave the last block, so the queries, the
output projection and the MLP of those rows need not be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_block import BlockRows, FollowedRows
from .row_notes import Backbone, RowNotes, compute_dtype, is_active


class PredictionPass:
    """A cheaper forward for one backbone.

    Args:
        backbone: The backbone.
        until_last: Runs the model up to its last block.
        path: The class path that is to note the rows on their way, if it is followed.
    """

    def __init__(
        self, backbone: Backbone, until_last: Callable[[Mapping[str, Any]], Tensor | None], path: RowNotes | None
    ) -> None:
        self.backbone, self.path = backbone, path
        self._until_last = until_last

    def features(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Head input of the examples.

        Args:
            inputs: The model's inputs, without labels.

        Returns:
            Features, shape ``(b, D)``, or None where this pass would not be the model's own: then the whole model has to run.
        """
        last, norm = self.backbone.blocks[-1], self.backbone.norm
        if any(is_active(dropout) for dropout in last.dropouts) or last.attention_dropout() > 0.0:
            return None
        hidden = self._until_last(inputs)
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
        if norm is None:
            return leaving
        return F.layer_norm(leaving, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
