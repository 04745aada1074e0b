"""The paper's predictor of a trunk's gradient: a window of recent exact examples, a regression on it, and bases to express gradients in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .bases import Basis, Side, initial, moved, turned
from .factored import Factors, find_layers
from .kernel_ridge import KERNELS, Fit, Kernel, fit, predict
from .window import Window

FEWEST = 128
"""Examples that the window must hold before anything is predicted."""

# Micro-batches: between fits; between moves of the bases; at first, when they move every time; that leave nothing in the window. Then examples.
_REFIT, _MOVE, _SETTLE, _BLIND, _BASIS_EXAMPLES = 16, 16, 8, 4, 16
_SIDE = ("basis", "moment")
_FIT = ("features", "pulled", "dual", "centre", "scale")


class Observation:
    """What a backward tells of exact examples, on its way into a predictor.

    Attributes:
        coordinates: Their gradients' coordinates, shape ``(b, P)``.
        products: Second moments applied to the bases, by layer, where the bases are to move.
    """

    def __init__(self, predictor: LinearPredictor, examples: int) -> None:
        self._predictor = predictor
        self.coordinates = torch.zeros(examples, predictor.size, device=predictor.device, dtype=predictor.dtype)
        self.products: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def arrived(self, position: int, gradients: Factors) -> None:
        """Add the gradients of one call of a layer; a layer that is called twice has their sum."""
        basis = self._predictor.bases[position]
        self.coordinates[:, self._predictor.columns[position]] += basis.project(gradients)
        if self._predictor.moves_bases and len(gradients.right) > 1:
            products = gradients.take(_BASIS_EXAMPLES).moment_products(basis.left.basis, basis.right.basis)
            self.products.setdefault(position, []).append(products)


class LinearPredictor:
    """Predicts the gradients of a trunk's parameters from features and last-layer gradients, as in arXiv 2511.05187.

    Bases are random at first, so the first few micro-batches only move them and leave nothing in the window.

    Args:
        trunk: The trunk, in training as it will be: which parameters are frozen is read here.
        window: How many examples are remembered.
        rank: Basis vectors on either side of a weight matrix.
        kernel: See :func:`~hf_lgp.linear.kernel_ridge.kernel_matrix`.
        ridge: See :func:`~hf_lgp.linear.kernel_ridge.fit`.
        seed: Of the initial bases.
        device: Where it lives; by default where the trunk does.
        dtype: In which it computes.

    Attributes:
        parameters: The trunk's trained parameters: gradients are aligned with them.
        layers: The layers whose gradients are predicted.
        bases: A basis for each of them.
        columns: The columns of each in the coordinates.
        size: Number ``P`` of coordinates.
        window: The window.

    Raises:
        ValueError: If window, rank, ridge or kernel cannot be used.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        window: int = 512,
        rank: int = 16,
        kernel: Kernel = "linear",
        ridge: float = 0.03,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if window < 2 or not ridge > 0 or kernel not in KERNELS:
            raise ValueError(f"Window, ridge or kernel cannot be used: {window}, {ridge}, {kernel!r}.")
        self.parameters = [p for p in trunk.parameters() if p.requires_grad]
        self.layers = find_layers(trunk)
        self.window, self.kernel, self.ridge, self.dtype = Window(window), kernel, ridge, dtype
        self.device = torch.device(device) if device is not None else self.parameters[0].device
        generator, like = torch.Generator().manual_seed(seed), torch.empty(0, device=self.device, dtype=dtype)
        self.bases: list[Basis] = [initial(layer.rows, layer.cols, rank, generator, like) for layer in self.layers]
        offsets = [0, *accumulate(basis.size for basis in self.bases)]
        self.columns, self.size = [slice(*ends) for ends in pairwise(offsets)], offsets[-1]
        self._seen, self._since_fit = 0, 0
        self._fit: Fit | None = None
        places = {id(p): k for k, p in enumerate(self.parameters)}
        self._places = [[places[id(p)] for p in layer.parameters] for layer in self.layers]

    @property
    def ready(self) -> bool:
        """Whether it predicts anything but zeros."""
        return self._fit is not None

    @property
    def moves_bases(self) -> bool:
        """Whether the next micro-batch moves the bases."""
        return self._seen < _SETTLE or self._seen % _MOVE == 0

    def gradients(self, features: Tensor, pulled: Tensor, weights: Tensor) -> list[Tensor | None]:
        """The weighted sum ``sum_i w_i J~_i^T delta_i`` of the examples' predicted gradients.

        Args:
            features: ``a``, shape ``(m, D)``.
            pulled: ``h``, shape ``(m, D)``.
            weights: ``w``, shape ``(m,)``.

        Returns:
            One tensor for each of :attr:`parameters`; None for those without a prediction, and for all until :attr:`ready`.
        """
        out: list[Tensor | None] = [None] * len(self.parameters)
        if self._fit is None or features.shape[1] != self._fit.features.shape[1]:
            return out
        coordinates = predict(self._fit, features.to(self.dtype), pulled.to(self.dtype), weights.to(self.dtype))
        for layer, basis, columns, places in zip(self.layers, self.bases, self.columns, self._places, strict=True):
            for k, gradient in zip(places, layer.gradients(basis.lift(coordinates[columns])), strict=True):
                before, gradient = out[k], gradient.to(self.parameters[k].dtype)
                out[k] = gradient if before is None else before + gradient
        return out

    def observe(self, features: Tensor, pulled: Tensor, observations: Sequence[Observation]) -> None:
        """Take in the exact examples of one micro-batch; bases and fit follow when they are due.

        Args:
            features: ``a``, shape ``(b, D)``.
            pulled: ``h``, shape ``(b, D)``, in any unit.
            observations: What was observed of the same examples, in their order and in the same unit.
        """
        coordinates = torch.cat([o.coordinates for o in observations])
        if self._seen >= _BLIND and self.window.fits(features):
            # The loss may be scaled otherwise in the next micro-batch: only the ratio of coordinates and h means anything.
            unit = pulled.norm(dim=1).mean().clamp(min=torch.finfo(self.dtype).tiny)
            self.window.add(features.to(self.dtype), (pulled / unit).to(self.dtype), coordinates / unit)
        if self.moves_bases:
            self._move_bases(observations)
        self._seen, self._since_fit = self._seen + 1, self._since_fit + 1
        enough = self.window.filled >= min(FEWEST, self.window.size)
        if enough and (self._fit is None or self._since_fit >= _REFIT):
            held, held_pulled, targets = self.window.content
            self._fit = fit(held, held_pulled, targets, self.kernel, self.ridge)
            self._since_fit = 0

    def _move_bases(self, observations: Sequence[Observation]) -> None:
        stored = list(self.window.content[2:])
        if self._fit is not None:
            self._fit = replace(self._fit, dual=self._fit.dual.clone())
            stored.append(self._fit.dual)
        for k, (old, columns) in enumerate(zip(list(self.bases), self.columns, strict=True)):
            told = [products for o in observations for products in o.products.get(k, [])]
            if not told:
                continue
            left, right = (torch.stack(side).sum(0) for side in zip(*told, strict=True))
            self.bases[k], *turns = moved(old, (left, right))
            for buffer in stored:
                buffer[:, columns] = turned(buffer[:, columns], old.shape, *turns)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which a predictor goes on exactly as this one would."""
        state = {"counters": torch.tensor([self._seen, self._since_fit])}
        state.update({f"window.{name}": value for name, value in self.window.state_dict().items()})
        for k, basis in enumerate(self.bases):
            for place, side in (("left", basis.left), ("right", basis.right)):
                state.update({f"bases.{k}.{place}.{name}": getattr(side, name).clone() for name in _SIDE})
        if self._fit is not None:
            state.update({f"fit.{name}": getattr(self._fit, name).clone() for name in _FIT})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If it belongs to another trunk, rank or window.
        """
        own = {name: value.shape for name, value in self.state_dict().items() if name.startswith("bases.")}
        if own != {name: value.shape for name, value in state.items() if name.startswith("bases.")}:
            raise ValueError("The stored bases belong to another trunk or rank.")
        like = self.bases[0].left.basis
        held = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
        self.window.load_state_dict(held, like)
        self._seen, self._since_fit = state["counters"].tolist()

        def restored(side: str) -> Side:
            return Side(*(state[f"bases.{side}.{name}"].to(like, copy=True) for name in _SIDE))

        self.bases = [Basis(restored(f"{k}.left"), restored(f"{k}.right")) for k in range(len(self.bases))]
        self._fit = None
        if "fit.dual" in state:
            self._fit = Fit(self.kernel, *(state[f"fit.{name}"].to(like, copy=True) for name in _FIT))
