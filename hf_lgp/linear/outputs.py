"""What modules return, joined: tuples, lists and mappings of tensors, whatever their type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..sealed import SpliceError


def zipped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to the tensors that stand at the same place in several outputs of one module.

    Args:
        function: Takes as many tensors as there are outputs.
        first: One output.
        others: Outputs of the same structure.

    Returns:
        A value of the same structure and type, with what the function returned.

    Raises:
        SpliceError: If the outputs differ in structure, or hold something that cannot be joined.
    """
    if any(type(other) is not type(first) for other in others):
        raise SpliceError("its trunk does not return the same for all examples")
    if isinstance(first, Tensor):
        return function(first, *others)
    if isinstance(first, Mapping):
        if any(other.keys() != first.keys() for other in others):
            raise SpliceError("its trunk does not return the same for all examples")
        items = {name: zipped(function, value, *(other[name] for other in others)) for name, value in first.items()}
        return items if type(first) is dict else type(first)(**items)
    if isinstance(first, tuple | list):
        if any(len(other) != len(first) for other in others):
            raise SpliceError("its trunk does not return the same for all examples")
        values = [zipped(function, *each) for each in zip(first, *others, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    if first is None or isinstance(first, bool | int | float | str):
        return first
    raise SpliceError(f"its trunk returns a {type(first).__name__}, which cannot be put together from parts")
