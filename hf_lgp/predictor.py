"""The gradient predictor: a sliding window of exact examples, a regression on it, and the subspace they share.

``observe`` takes the exact examples of a step, ``predict`` turns last-layer quantities into gradient coordinates. New
examples wait in a queue and enter the window only when the regression is refitted, so that the fitted weights always
belong to the coordinates they are applied to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .alignment import Alignment
from .regression import Kernel, KernelRidge
from .subspace import Subspace


class GradientPredictor:
    """Linear gradient prediction by kernel ridge regression in factored coordinates.

    Args:
        subspace: Bases of all tensors; their coordinates are what is predicted.
        features: Width ``D`` of the head's input.
        window: Number of examples remembered.
        queue: Number of examples that fit between two refits; when it is full, further ones are dropped.
        kernel: See :class:`~hf_lgp.regression.KernelRidge`.
        ridge: See :class:`~hf_lgp.regression.KernelRidge`.
        memory: Calls of :meth:`observe` after which what was learned has faded to 1/e; infinity for no fading.
        device: Where everything lives.
        dtype: Dtype of the window.

    Attributes:
        subspace: The bases.
        alignment: Prequential moments of exact against predicted coordinates.
        size: Number of examples in the window.

    Raises:
        ValueError: If ``window`` or ``queue`` is not positive.
    """

    def __init__(
        self,
        subspace: Subspace,
        features: int,
        window: int,
        *,
        queue: int,
        kernel: Kernel = "rbf",
        ridge: float = 0.03,
        memory: float = math.inf,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if window < 1 or queue < 1:
            raise ValueError(f"Window and queue must hold at least one example, got {window} and {queue}.")
        self.subspace = subspace
        self.window, self.queue, self.memory = window, queue, memory
        self.regression = KernelRidge(kernel, ridge)
        self.alignment = Alignment(len(subspace.segments), device=device, dtype=dtype)
        rows = window + queue
        # Window and queue are one allocation: rows [0, window) are the ring, the rest waits for the next refit.
        self._features = torch.zeros(rows, features, device=device, dtype=dtype)
        self._pullbacks = torch.zeros(rows, features, device=device, dtype=dtype)
        self._coordinates = torch.zeros(rows, subspace.size, device=device, dtype=dtype)
        self._times = torch.zeros(rows, device=device, dtype=dtype)
        self._clock = 0
        self.size = 0
        self._next = 0
        self._waiting = 0

    @property
    def ready(self) -> bool:
        """Whether predictions can be made and their quality has been measured at least twice."""
        return self.regression.fitted and self.alignment.batches >= 2

    @property
    def remembered(self) -> int:
        """Examples in the window and in the queue."""
        return min(self.window, self.size + self._waiting)

    @property
    def waiting(self) -> int:
        """Examples in the queue."""
        return self._waiting

    def observe(self, features: Tensor, pullbacks: Tensor, coordinates: Tensor) -> None:
        """Queue exact examples for the window.

        An example with a non-finite entry is queued as zeros, which neither the regression nor a prediction feels.

        Args:
            features: ``a``, shape ``(b, D)``.
            pullbacks: ``h``, shape ``(b, D)``.
            coordinates: ``C``, shape ``(b, P)``, of the same examples and in the same units as ``pullbacks``.
        """
        count = min(len(features), self.queue - self._waiting)
        if count <= 0:
            return
        features, pullbacks, coordinates = features[:count], pullbacks[:count], coordinates[:count]
        finite = (features.sum(1) + pullbacks.sum(1) + coordinates.sum(1)).isfinite()[:, None]
        rows = slice(self.window + self._waiting, self.window + self._waiting + count)
        for buffer, values in (
            (self._features, features),
            (self._pullbacks, pullbacks),
            (self._coordinates, coordinates),
        ):
            buffer[rows] = torch.where(
                finite, values.to(buffer.dtype), torch.zeros((), dtype=buffer.dtype, device=buffer.device)
            )
        self._times[rows] = float(self._clock)
        self._clock += 1
        self._waiting += count

    def measure(self, coordinates: Tensor, path: Tensor | None, predicted: Tensor) -> None:
        """Compare exact with predicted coordinates of examples the window has not seen.

        Args:
            coordinates: ``C``, shape ``(b, P)``, with ``b >= 2``.
            path: Coordinates of the class path, shape ``(b, P)``; None without one.
            predicted: What the regression predicted before these examples were observed, shape ``(b, P)``.
        """
        if len(coordinates) < 2:
            return
        path = torch.zeros_like(coordinates) if path is None else path
        g, p, r = (values - values.mean(0) for values in (coordinates, path, predicted))
        products = torch.stack([(x * y).sum(0) for x, y in ((g, g), (g, p), (g, r), (p, p), (p, r), (r, r))])
        self.alignment.update(torch.stack([self.subspace.per_tensor_sums(row) for row in products]))

    def refit(self) -> None:
        """Move the queue into the window, oldest examples first out, and fit the regression to it."""
        while self._waiting > 0:
            count = min(self._waiting, self.window - self._next)
            target = slice(self._next, self._next + count)
            source = slice(self.window, self.window + count)
            for buffer in (self._features, self._pullbacks, self._coordinates, self._times):
                buffer[target] = buffer[source]
                if count < self._waiting:
                    rest = slice(self.window + count, self.window + self._waiting)
                    buffer[self.window : self.window + self._waiting - count] = buffer[rest].clone()
            self._next = (self._next + count) % self.window
            self.size = min(self.window, self.size + count)
            self._waiting -= count
        if self.size > 0:
            self._fit()

    def _fit(self) -> None:
        ages = None
        if math.isfinite(self.memory):
            times = self._times[: self.size]
            ages = (times.max() - times) / self.memory
        self.regression.fit(self._features[: self.size], self._pullbacks[: self.size], ages)

    def kernel_rows(self, features: Tensor, pullbacks: Tensor) -> Tensor:
        """Kernel between a batch and the window, shape ``(q, n)``. Linear in ``pullbacks``."""
        dtype = self._features.dtype
        return self.regression.cross_kernel(features.to(dtype), pullbacks.to(dtype))

    def predict(self, kernel_rows: Tensor) -> Tensor:
        """Predicted coordinates of rows of :meth:`kernel_rows`, or of linear combinations of them, shape ``(q, P)``."""
        return self.regression.weights(kernel_rows) @ self._coordinates[: self.size]

    def move_bases(self) -> None:
        """Make accumulated power steps effective, re-expressing window and queue."""
        queue = self._coordinates[self.window : self.window + self._waiting]
        self.subspace.update([part for part in (self._coordinates[: self.size], queue) if len(part)])

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors needed to go on exactly where this predictor stands."""
        rows = self.window + self._waiting
        state = {
            "features": self._features[:rows],
            "pullbacks": self._pullbacks[:rows],
            "coordinates": self._coordinates[:rows],
            "times": self._times[:rows],
            "counters": torch.tensor([self.size, self._next, self._waiting, int(self.regression.fitted), self._clock]),
        }
        state.update({f"subspace.{name}": value for name, value in self.subspace.state_dict().items()})
        state.update({f"alignment.{name}": value for name, value in self.alignment.state_dict().items()})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state belongs to another model, window or rank.
        """
        rows = state["features"].shape[0]
        size, next_row, waiting, fitted, clock = (int(value) for value in state["counters"])
        if (
            rows != self.window + waiting
            or waiting > self.queue
            or state["features"].shape[1:] != self._features.shape[1:]
            or state["coordinates"].shape[1:] != self._coordinates.shape[1:]
        ):
            raise ValueError("The stored predictor has another window, rank or model.")

        def part(name: str) -> dict[str, Tensor]:
            return {key[len(name) :]: value for key, value in state.items() if key.startswith(name)}

        self.subspace.load_state_dict(part("subspace."))
        self.alignment.load_state_dict(part("alignment."))
        for buffer, name in (
            (self._features, "features"),
            (self._pullbacks, "pullbacks"),
            (self._coordinates, "coordinates"),
            (self._times, "times"),
        ):
            buffer[:rows] = state[name].to(buffer)
        self.size, self._next, self._waiting, self._clock = size, next_row, waiting, clock
        self.regression = KernelRidge(self.regression.kernel, self.regression.ridge)
        if fitted:
            self._fit()
