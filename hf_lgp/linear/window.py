"""A window of recent exact examples: a ring of features, last-layer gradients and gradient coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = ("features", "pulled", "coordinates")


class Window:
    """The last ``n`` examples.

    Args:
        size: ``n``.

    Attributes:
        filled: Examples in it.
    """

    def __init__(self, size: int) -> None:
        self.size, self.filled, self._next = size, 0, 0
        # Widths are known once the first examples were seen.
        self._buffers: tuple[Tensor, ...] = ()

    @property
    def content(self) -> tuple[Tensor, ...]:
        """Features ``(n, D)``, last-layer gradients ``(n, D)`` and coordinates ``(n, P)``: views of what it holds; empty if it holds nothing."""
        return tuple(buffer[: self.filled] for buffer in self._buffers)

    def fits(self, features: Tensor) -> bool:
        """Whether features have the width of those it holds."""
        return not self._buffers or self._buffers[0].shape[1] == features.shape[1]

    def add(self, features: Tensor, pulled: Tensor, coordinates: Tensor) -> None:
        """Take in ``b`` examples; the oldest go.

        Args:
            features: Shape ``(b, D)``.
            pulled: Shape ``(b, D)``.
            coordinates: Shape ``(b, P)``.
        """
        values = [value[-self.size :] for value in (features, pulled, coordinates)]
        if not self._buffers:
            self._buffers = tuple(value.new_zeros(self.size, value.shape[1]) for value in values)
        # A row with an infinite entry becomes zeros, which neither the regression nor a prediction feels.
        finite = torch.stack([value.isfinite().all(1) for value in values]).all(0)[:, None]
        rows = (torch.arange(len(finite), device=features.device) + self._next) % self.size
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[rows] = torch.where(finite, value, torch.zeros_like(value))
        self._next = (self._next + len(finite)) % self.size
        self.filled = min(self.size, self.filled + len(finite))

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on from here."""
        held = {name: part.clone() for name, part in zip(_NAMES, self.content, strict=False)}
        return {"counters": torch.tensor([self.size, self.filled, self._next]), **held}

    def load_state_dict(self, state: Mapping[str, Tensor], like: Tensor) -> None:
        """Restore :meth:`state_dict` on the device and in the dtype of ``like``.

        Raises:
            ValueError: If it belongs to a window of another size.
        """
        size, self.filled, self._next = state["counters"].tolist()
        if size != self.size:
            raise ValueError(f"The stored window has {size} examples, not {self.size}.")
        self._buffers = tuple(like.new_zeros(size, state[name].shape[1]) for name in _NAMES if name in state)
        for buffer, name in zip(self._buffers, _NAMES, strict=False):
            buffer[: self.filled] = state[name].to(like)
