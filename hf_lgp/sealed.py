"""Tensors that may not be read: what a stack of blocks hands on while its own values are kept elsewhere.

A value that was not computed must be impossible to read by accident. A mean over one row, or a zero, would be silently wrong; these raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SpliceError(RuntimeError):
    """A model uses its stack of blocks in a way in which it cannot be spliced; the message says which.

    Attributes:
        in_backward: Whether some parameters may have gradients of the step by now.
    """

    in_backward = False


_ATTRIBUTES = "shape dtype device requires_grad is_cuda ndim layout grad_fn is_leaf is_sparse"
_METHODS = "size dim is_floating_point is_complex __len__ as_subclass get_device"
_LOOKED_AT = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()} | {
    getattr(Tensor, n) for n in _METHODS.split()
}
"""What does not read a value."""


class Sealed(Tensor):
    """A tensor without values: any function of it raises :class:`SpliceError`."""

    @classmethod
    def of(cls, like: Tensor) -> Sealed:
        """A sealed tensor of the same shape, dtype and device; it takes no memory."""
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKED_AT:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise SpliceError(f"what its blocks hand to one another is read elsewhere, by `{func.__name__}`")

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


_ROW_BY_ROW: set[Any] = {F.layer_norm, F.rms_norm, F.dropout, F.linear, Tensor.to, Tensor.float, Tensor.type_as}
"""Functions of each row by itself."""


class FirstRow(Tensor):
    """The first row of a sequence whose other rows were not computed, shape ``(m, 1, D)``.

    The first row may be taken out of it, and functions that work row by row give the same of their result. All else raises
    :class:`SpliceError`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKED_AT:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ROW_BY_ROW:
                return func(*args, **kwargs).as_subclass(cls)
            if func is Tensor.__getitem__ and (taken := _first_row_of(args[1])) is not None:
                return func(args[0], taken)
            if func is Tensor.select and tuple(args[1:]) == (1, 0):
                return func(*args)
        raise SpliceError(f"it reads more than the first row of its last block, by `{func.__name__}`")


def _first_row_of(index: Any) -> Any:
    """The index if it takes the first row of all examples and nothing else, else None."""
    if not isinstance(index, Sequence) or len(index) < 2 or index[0] not in (slice(None), Ellipsis):
        return None
    row, rest = index[1], index[2:]
    if not ((type(row) is int and row == 0) or row in (slice(0, 1), slice(None, 1), slice(0, 1, 1))):
        return None
    return tuple(index) if index[0] == slice(None) and all(i == slice(None) for i in rest) else None
