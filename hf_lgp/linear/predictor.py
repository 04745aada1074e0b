"""The paper's predictor of a trunk's gradient: a window of recent exact examples, a regression on it, and bases to express gradients in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..settings import LGPSettings
from .bases import Basis, initial, moved, turned
from .factored import Factors, find_layers
from .kernel_ridge import Fit, fit, predict

FEWEST = 128  # examples that the window must hold before anything is predicted
# Micro-batches between moves of the bases, each with a fit; first ones, after each of which they move; first ones that leave nothing in the window.
_MOVE, _SETTLE, _BLIND = 16, 8, 4
_BASIS_EXAMPLES = 16  # that the bases follow, of a group


class Observation:
    """What a backward tells of ``b`` exact examples: coordinates ``(b, P)`` and, where the bases are to move, their products by layer."""

    def __init__(self, predictor: LinearPredictor, examples: int) -> None:
        self._predictor = predictor
        self.coordinates = torch.zeros(examples, predictor.size, device=predictor.device, dtype=predictor.dtype)
        self.products: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def arrived(self, position: int, gradients: Factors) -> None:
        """Add the gradients of one call of a layer; a layer that is called twice has their sum."""
        basis = self._predictor.bases[position]
        self.coordinates[:, self._predictor.columns[position]] += basis.project(gradients)
        if self._predictor.moves_bases and len(self.coordinates) > 1:
            few = gradients[0][:_BASIS_EXAMPLES], gradients[1][:_BASIS_EXAMPLES]
            self.products.setdefault(position, []).append(basis.products(few))


class LinearPredictor:
    """Predicts the gradients of a trunk's parameters from features and last-layer gradients, as in arXiv 2511.05187.

    Of the settings it has window, rank, kernel, ridge and seed. Bases are random at first, so the first few micro-batches only move them and leave
    nothing in the window.

    Attributes:
        parameters: The trunk's parameters that were trained when this was made: gradients are aligned with them.
        layers: The layers whose gradients are predicted, with :attr:`bases` and their :attr:`columns` among the :attr:`size` coordinates.
    """

    def __init__(self, trunk: nn.Module, settings: LGPSettings, dtype: torch.dtype = torch.float32) -> None:
        self.parameters = [p for p in trunk.parameters() if p.requires_grad]
        self.layers = find_layers(trunk)
        self.kernel, self.ridge, self.dtype = settings.kernel, settings.ridge, dtype
        self.device = self.parameters[0].device
        generator, like = torch.Generator().manual_seed(settings.seed), torch.empty(0, device=self.device, dtype=dtype)
        self.bases: list[Basis] = [
            initial(each.rows, each.cols, settings.rank, generator, like) for each in self.layers
        ]
        offsets = [0, *accumulate(a * b for a, b in (basis.shape for basis in self.bases))]
        self.columns, self.size = [slice(*ends) for ends in pairwise(offsets)], offsets[-1]
        places = {id(p): k for k, p in enumerate(self.parameters)}
        self._places = [[places[id(p)] for p in layer.parameters] for layer in self.layers]
        self._seen, self._added = 0, 0
        self._fit: Fit | None = None
        # A ring of a (n, D), h (n, D) and coordinates (n, P), whose widths are known once examples were seen.
        self._length, self._ring = settings.window, list[Tensor]()

    @property
    def ready(self) -> bool:
        """Whether it predicts anything but zeros."""
        return self._fit is not None

    @property
    def moves_bases(self) -> bool:
        """Whether the next micro-batch moves the bases."""
        return self._seen < _SETTLE or self._seen % _MOVE == 0

    def gradients(self, features: Tensor, pulled: Tensor, weights: Tensor) -> list[Tensor | None]:
        """``sum_i w_i J~_i^T delta_i`` for ``a (m, D)``, ``h (m, D)``, ``w (m,)``: one tensor or None for each parameter, None for all until :attr:`ready`."""
        out: list[Tensor | None] = [None] * len(self.parameters)
        if self._fit is None or features.shape[1] != self._fit.features.shape[1]:
            return out
        coordinates = predict(self.kernel, self._fit, *(t.to(self.dtype) for t in (features, pulled, weights)))
        for layer, basis, columns, places in zip(self.layers, self.bases, self.columns, self._places, strict=True):
            for k, gradient in zip(places, layer.gradients(basis.lift(coordinates[columns])), strict=True):
                gradient, before = gradient.to(self.parameters[k].dtype), out[k]
                out[k] = gradient if before is None else before + gradient
        return out

    def observe(self, features: Tensor, pulled: Tensor, observations: Sequence[Observation]) -> None:
        """Take in ``b`` exact examples of a micro-batch: ``a (b, D)``, ``h (b, D)`` and what was told of them, in any unit. Bases and fit follow when due."""
        if self._seen >= _BLIND and (not self._ring or self._ring[0].shape[1] == features.shape[1]):
            # The loss may be scaled otherwise in the next micro-batch: only the ratio of coordinates and h means anything.
            unit = pulled.norm(dim=1).mean().clamp(min=torch.finfo(self.dtype).tiny)
            coordinates = torch.cat([o.coordinates for o in observations])
            self._add([t.to(self.dtype) for t in (features, pulled / unit, coordinates / unit)])
        moves = self.moves_bases
        for k, (old, columns) in enumerate(zip(list(self.bases), self.columns, strict=True)):
            told = [products for o in observations for products in o.products.get(k, [])] if moves else []
            if told:
                left, right = (torch.stack(side).sum(0) for side in zip(*told, strict=True))
                self.bases[k], *turns = moved(old, (left, right))
                for stored in self._ring[2:]:
                    stored[:, columns] = turned(stored[:, columns], old.shape, *turns)
        self._seen += 1
        # Whenever the bases move a fit follows, as its targets are in these bases.
        if self._added >= min(FEWEST, self._length) and (moves or self._fit is None):
            self._fit = fit(self.kernel, self.ridge, *(held[: self._added] for held in self._ring))

    def _add(self, values: list[Tensor]) -> None:
        """Put ``b`` examples into the ring; the oldest go."""
        values = [value[-self._length :] for value in values]
        if not self._ring:
            self._ring = [value.new_zeros(self._length, value.shape[1]) for value in values]
        # A row with an infinite entry becomes zeros, which neither the regression nor a prediction feels.
        finite = torch.stack([value.isfinite().all(1) for value in values]).all(0)[:, None]
        rows = (torch.arange(len(finite), device=finite.device) + self._added) % self._length
        for buffer, value in zip(self._ring, values, strict=True):
            buffer[rows] = torch.where(finite, value, torch.zeros_like(value))
        self._added += len(finite)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which a predictor goes on exactly as this one would."""
        state = {f"window.{k}": held[: self._added] for k, held in enumerate(self._ring)}
        state |= {f"bases.{k}.{name}": t for k, b in enumerate(self.bases) for name, t in b._asdict().items()}
        state |= {f"fit.{name}": t for name, t in self._fit._asdict().items()} if self._fit is not None else {}
        counters = torch.tensor([self._length, self._seen, self._added])
        return {"counters": counters, **{name: t.clone() for name, t in state.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; :class:`ValueError` if it belongs to another trunk, rank or window."""
        own = {name: t.shape for name, t in self.state_dict().items() if name.startswith("bases.")}
        length, seen, added = state["counters"].tolist()
        if length != self._length or own != {name: t.shape for name, t in state.items() if name.startswith("bases.")}:
            raise ValueError("The stored state belongs to another trunk, rank or window.")
        stored = {name: t.to(self.device, self.dtype, copy=True) for name, t in state.items()}
        self.bases = [Basis(*(stored[f"bases.{k}.{n}"] for n in Basis._fields)) for k in range(len(self.bases))]
        self._fit = Fit(*(stored[f"fit.{name}"] for name in Fit._fields)) if "fit.dual" in stored else None
        held = [stored[f"window.{k}"] for k in range(3) if f"window.{k}" in stored]
        self._ring = [torch.cat([t, t.new_zeros(length - len(t), t.shape[1])]) for t in held]
        self._seen, self._added = seen, added
