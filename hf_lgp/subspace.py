"""Factored gradient coordinates: two small bases for every tensor of a model.

A weight matrix's per-example gradient ``G`` (rows x cols) is kept as ``C = A^T G B`` with orthonormal ``A`` (rows x k_a) and ``B``
(cols x k_b), the leading singular spaces of recent centred per-example gradients; lifting back is ``A C B^T``. Bases follow
training by warm-started orthogonal iteration on exponentially averaged second moments, and stored coordinates are
re-expressed when they move: ``C <- (A_new^T A_old) C (B_old^T B_new)``.

Tensors of equal shape are stacked into groups, so that projections, lifts and orthogonalisations run batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Factors


def basis_sizes(rows: int, cols: int, rank: int) -> tuple[int, int]:
    """Numbers of basis vectors ``(k_a, k_b)`` of a tensor: about ``rank^2`` coordinates each, whatever its shape.

    A matrix gets ``rank`` on either side. Where one side is shorter than ``rank`` (vectors: 1 row; a LayerNorm's weight
    and bias: 2 rows) it is kept whole and the other side gets the coordinates left over.
    """
    short_rows, short_cols = min(rows, rank), min(cols, rank)
    return min(rows, max(rank, rank * rank // short_cols)), min(cols, max(rank, rank * rank // short_rows))


@dataclass(frozen=True)
class Segment:
    """Where one tensor's coordinates live: columns ``start : start + size`` of the flat coordinates, group and index."""

    group: int
    index: int
    start: int
    size: int


class _Group:
    """Tensors of equal shape: stacked bases ``(L, rows, k_a)`` and ``(L, cols, k_b)`` and their moment estimates."""

    def __init__(
        self, count: int, rows: int, cols: int, rank: int, start: int, generator: torch.Generator, like: Tensor
    ) -> None:
        self.count, self.rows, self.cols, self.start = count, rows, cols, start
        self.left_size, self.right_size = basis_sizes(rows, cols, rank)
        self.left = _initial_basis(count, rows, self.left_size, generator, like)
        self.right = _initial_basis(count, cols, self.right_size, generator, like)
        self.left_moment = like.new_zeros(count, self.left_size, self.left_size)
        self.right_moment = like.new_zeros(count, self.right_size, self.right_size)

    @property
    def tensor_size(self) -> int:
        return self.left_size * self.right_size

    @property
    def stop(self) -> int:
        return self.start + self.count * self.tensor_size

    def unflatten(self, coordinates: Tensor) -> Tensor:
        """View of flat coordinates ``(n, P)`` as ``(n, L, k_a, k_b)``."""
        return coordinates[:, self.start : self.stop].unflatten(1, (self.count, self.left_size, self.right_size))


def _initial_basis(count: int, dimension: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    if size == dimension:
        return torch.eye(dimension, dtype=like.dtype, device=like.device).expand(count, -1, -1).clone()
    random = torch.randn(count, dimension, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random).Q.to(like)


def _orthonormalise(products: Tensor, previous: Tensor) -> Tensor:
    """Orthonormal basis of the columns of each matrix, shape ``(L, d, k)``, by Cholesky QR in float64.

    A little of the previous basis keeps the Gram matrix well conditioned where the products are rank deficient, and
    keeps the basis where they vanish altogether.
    """
    wide, old = products.double(), previous.double()
    size = wide.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(2):  # the second pass removes the rounding that the first one's conditioning let through
        wide = wide / size + 1e-6 * old
        gram = wide.mT @ wide
        factor = torch.linalg.cholesky_ex(gram).L
        wide = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False)
        old, size = torch.zeros_like(old), torch.ones_like(size)
    # A basis that came out non-finite (non-finite gradients went in) must not replace a good one.
    healthy = wide.isfinite().flatten(1).all(1)[:, None, None]
    # One memory layout, whatever the solver returns: rounding depends on it, and a resumed run must round alike.
    return torch.where(healthy, wide, previous.double()).to(previous.dtype).contiguous()


def _turn(blocks: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left C right^T`` for every ``C`` of ``blocks``, shape ``(n, k_a, k_b)``, as two large products."""
    rows, left_size, right_size = blocks.shape
    if right is not None:
        blocks = (blocks.reshape(-1, right_size) @ right.T).view(rows, left_size, right_size)
    if left is not None:
        blocks = (blocks.mT.reshape(-1, left_size) @ left.T).view(rows, right_size, left_size).mT
    return blocks


class Subspace:
    """Bases, projection, lift and re-expression for all tensors of a model.

    Args:
        shapes: ``(rows, cols)`` of every tensor's gradient matrix.
        rank: Basis vectors ``k`` per side, one number or one per tensor; clipped to the shape.
        decay: Weight of the past in the exponential average of second moments.
        seed: Seed of the private generator of the initial bases.
        device: Where the bases live.
        dtype: Their dtype.

    Attributes:
        segments: Where each tensor's coordinates live, in the order of ``shapes``.
        size: Total number ``P`` of coordinates of one example.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int | Sequence[int],
        *,
        decay: float = 0.7,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        ranks = [rank] * len(shapes) if isinstance(rank, int) else list(rank)
        if min(ranks) < 1:
            raise ValueError(f"The rank must be at least 1, got {min(ranks)}.")
        self.shapes, self.decay = list(shapes), decay
        generator = torch.Generator().manual_seed(seed)
        like = torch.empty(0, device=device, dtype=dtype)
        members: dict[tuple[int, int, int], list[int]] = {}
        for position, ((rows, cols), own_rank) in enumerate(zip(self.shapes, ranks, strict=True)):
            members.setdefault((rows, cols, own_rank), []).append(position)
        self._groups: list[_Group] = []
        segments: dict[int, Segment] = {}
        start = 0
        for (rows, cols, own_rank), positions in members.items():
            group = _Group(len(positions), rows, cols, own_rank, start, generator, like)
            for index, position in enumerate(positions):
                segments[position] = Segment(
                    len(self._groups), index, start + index * group.tensor_size, group.tensor_size
                )
            self._groups.append(group)
            start = group.stop
        self.segments = [segments[position] for position in range(len(self.shapes))]
        self.size = start
        order = sorted(range(len(self.segments)), key=lambda position: self.segments[position].start)
        self._lengths = torch.tensor([self.segments[p].size for p in order], device=device)
        self._rank_of_position = torch.tensor(order, device=device).argsort()
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def bases(self, tensor: int) -> tuple[Tensor, Tensor]:
        """``A`` of shape ``(rows, k_a)`` and ``B`` of shape ``(cols, k_b)`` of one tensor."""
        segment = self.segments[tensor]
        group = self._groups[segment.group]
        return group.left[segment.index], group.right[segment.index]

    def project(self, tensor: int, factors: Factors) -> Tensor:
        """Flat coordinates of per-example gradients of one tensor, shape ``(b, k_a * k_b)``."""
        return factors.project(*self.bases(tensor)).flatten(1)

    def blocks(self, tensor: int, coordinates: Tensor) -> Tensor:
        """View of one tensor's coordinates in flat ones: ``(n, P)`` to ``(n, k_a, k_b)``."""
        segment = self.segments[tensor]
        group = self._groups[segment.group]
        return coordinates[:, segment.start : segment.start + segment.size].unflatten(
            1, (group.left_size, group.right_size)
        )

    def lift(self, coordinates: Tensor) -> list[Tensor]:
        """Gradient matrices ``A C B^T`` of every tensor, shapes ``(rows, cols)``.

        Args:
            coordinates: Flat coordinates of one gradient, shape ``(P,)``.
        """
        return [left @ right.T for left, right in self.lift_factors(coordinates)]

    def lift_factors(self, coordinates: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same as factors ``(A C, B)``, shapes ``(rows, k_b)`` and ``(cols, k_b)``."""
        lifted = [group.left @ group.unflatten(coordinates[None])[0] for group in self._groups]
        return [
            (lifted[segment.group][segment.index], self._groups[segment.group].right[segment.index])
            for segment in self.segments
        ]

    def per_tensor_sums(self, values: Tensor) -> Tensor:
        """Sum flat coordinates within each tensor: ``(P,)`` to ``(L,)``, in the order of ``shapes``."""
        sums = torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)
        return sums[self._rank_of_position]

    def per_coordinate(self, values: Tensor) -> Tensor:
        """Spread one value per tensor over its coordinates: ``(L,)`` to ``(P,)``."""
        in_order = torch.empty_like(values).scatter_(0, self._rank_of_position, values)
        return in_order.repeat_interleave(self._lengths, output_size=self.size)

    def accumulate(self, tensor: int, factors: Factors) -> None:
        """Take the power step of one tensor on fresh per-example gradients; :meth:`update` makes it effective.

        Args:
            tensor: Position of the tensor in ``shapes``.
            factors: Gradients of ``b`` examples, ``b >= 2`` (the moments are centred).
        """
        self._products[tensor] = factors.moment_products(*self.bases(tensor))

    def pending(self) -> list[Tensor]:
        """Accumulated products, to be averaged over processes in place before :meth:`update`; zeros for tensors without any."""
        for position, (rows, cols) in enumerate(self.shapes):
            if position not in self._products:
                left, right = self.bases(position)
                self._products[position] = left.new_zeros(rows, left.shape[1]), right.new_zeros(cols, right.shape[1])
        return [product for position in range(len(self.shapes)) for product in self._products[position]]

    def update(self, coordinates: Sequence[Tensor]) -> None:
        """Move the bases to the accumulated products and re-express stored coordinates, in place.

        Args:
            coordinates: Buffers of flat coordinates, each of shape ``(n, P)``, to express in the new bases.
        """
        for number, group in enumerate(self._groups):
            positions = [p for p, segment in enumerate(self.segments) if segment.group == number]
            if not any(position in self._products for position in positions):
                continue
            # A tensor without fresh gradients takes its averaged moments for them, which keeps the span of its bases.
            idle = list(zip(group.left @ group.left_moment, group.right @ group.right_moment, strict=True))
            products = [self._products.get(p, idle[index]) for index, p in enumerate(positions)]
            left_turn = self._move(group, "left", torch.stack([left for left, _ in products]))
            right_turn = self._move(group, "right", torch.stack([right for _, right in products]))
            # One tensor at a time: its columns of a whole window fit into a cache, those of a group do not.
            for index in range(group.count):
                start = group.start + index * group.tensor_size
                for buffer in coordinates:
                    columns = buffer[:, start : start + group.tensor_size]
                    turned = _turn(
                        columns.unflatten(1, (group.left_size, group.right_size)),
                        None if left_turn is None else left_turn[index],
                        None if right_turn is None else right_turn[index],
                    )
                    columns.copy_(turned.flatten(1))
        self._products.clear()

    def _move(self, group: _Group, side: str, products: Tensor) -> Tensor | None:
        """Move one side of a group; return ``basis_new^T basis_old`` of shape ``(L, k, k)``, or None if it is complete."""
        basis: Tensor = getattr(group, side)
        if basis.shape[1] == basis.shape[2]:
            return None
        moment: Tensor = getattr(group, f"{side}_moment")
        # Moments are averaged after scaling each to unit size: gradients shrink by orders of magnitude in early training, and
        # without it the large old ones would hold the bases where they were.
        wide = products.double()  # squares of small products underflow in float32
        fresh = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)).to(products.dtype)
        mixed = self.decay * (basis @ moment) + (1.0 - self.decay) * fresh
        moved = _orthonormalise(mixed, basis)
        turn = moved.mT @ basis
        rotated = (moved.mT @ mixed) @ turn.mT
        moment = torch.where(rotated.isfinite().flatten(1).all(1)[:, None, None], 0.5 * (rotated + rotated.mT), moment)
        setattr(group, side, moved)
        setattr(group, f"{side}_moment", moment.contiguous())
        return turn

    def state_dict(self) -> dict[str, Tensor]:
        """Bases and moments by name; shapes follow from the constructor's arguments."""
        state = {}
        for number, group in enumerate(self._groups):
            for name in ("left", "right", "left_moment", "right_moment"):
                state[f"{number}.{name}"] = getattr(group, name)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state belongs to tensors of other shapes or to another rank.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("The stored bases belong to another model or rank.")
        for number, group in enumerate(self._groups):
            for name in ("left", "right", "left_moment", "right_moment"):
                setattr(group, name, state[f"{number}.{name}"].to(getattr(group, name), copy=True))
