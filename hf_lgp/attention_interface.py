"""Attention of models, sent to another function for a while: that of ``transformers``, whatever is configured, and PyTorch's own where a model calls it itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from .rows.parts import AttentionFunction
from .sealed import SpliceError

_UNKNOWN = "softcap", "s_aux"
"""Options of attention that predictions do without, and exact gradients cannot."""


@contextmanager
def intercepted_attention(function: AttentionFunction) -> Iterator[None]:
    """A context in which models call ``function`` for attention; their configuration, and the masks they make for it, stay as they are."""
    get_interface, product = AttentionInterface.get_interface, F.scaled_dot_product_attention

    def interface(self: AttentionInterface, implementation: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(configured, implementation, get_interface(self, implementation, *args, **kwargs))

    def configured(
        implementation: str,
        original: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        def plain() -> Any:
            with patch.object(F, "scaled_dot_product_attention", product):  # or it would be heard twice
                return original(module, query, key, value, attention_mask, **options)

        mask, causal = attention_mask, options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if implementation == "eager":  # for which causality is in the mask
            causal = False
        elif isinstance(mask, Tensor) and mask.dim() == 2:  # which rows are no padding, for flash attention
            mask = mask[:, None, None].bool()
        else:
            causal = causal and mask is None
        if getattr(function, "exact", False) and any(options.get(name) is not None for name in _UNKNOWN):
            raise SpliceError("its attention does more than a softmax of products and masks")
        masks = tuple(m for m in (mask, options.get("position_bias")) if m is not None)
        window = options.get("sliding_window")
        if isinstance(window, int) and implementation not in ("eager", "sdpa"):  # for which it is in the mask
            at = torch.arange(key.shape[2], device=key.device)
            masks = (*masks, ((at[:, None] - at).abs() < window)[None, None])
        return function(plain, query, key, value, masks, causal, options.get("scaling"), options.get("dropout", 0.0))

    def direct(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        def plain() -> tuple[Tensor, None]:
            return product(query, key, value, *args, **options).transpose(1, 2), None

        if query.dim() != 4:
            return product(query, key, value, *args, **options)
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | options
        mask, causal, dropout = given.get("attn_mask"), given.get("is_causal", False), given.get("dropout_p", 0.0)
        masks = () if mask is None else (mask[(None,) * (4 - mask.dim())],)
        out: Tensor = function(plain, query, key, value, masks, causal, given.get("scale"), dropout)[0]
        return out.transpose(1, 2)

    with patch.object(AttentionInterface, "get_interface", interface):
        with patch.object(F, "scaled_dot_product_attention", direct):
            yield
