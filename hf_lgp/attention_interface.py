"""Attention of ``transformers`` models, sent to another function for a while, whatever implementation the model is configured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from transformers import AttentionInterface

from .rows.parts import AttentionFunction


@contextmanager
def intercepted_attention(function: AttentionFunction) -> Iterator[None]:
    """A context in which models call ``function`` for attention; their configuration, and the masks they make for it, stay as they are."""
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(function, original(self, *args, **kwargs))

    with patch.object(AttentionInterface, "get_interface", get_interface):
        yield
