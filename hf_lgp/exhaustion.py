"""Exhausted memory: telling it from other errors, and leaving a backward pass intact where a hook runs out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MESSAGES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class Exhaustion:
    """Remembers that memory ran out.

    Attributes:
        error: The first such error, or None.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note exhausted memory inside instead of raising: what is inside must be dispensable."""
        try:
            yield
        except Exception as error:
            if not is_exhaustion(error):
                raise
            self.error = self.error or error.with_traceback(None)  # a traceback would keep what filled the memory
