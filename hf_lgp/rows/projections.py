"""Maps that keys and values are made by, found by what they compute: a linear layer, a part of one, a parameter of an attention module, a layer with adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Affine


@dataclass(frozen=True)
class Projection:
    """An affine map from rows ``(m, T, D)`` to heads ``(m, H, T, d)``.

    Attributes:
        module: Whose parameter its weight is, or what is affine as a whole.
        weight: The name of that parameter; None where the module is called to find out its weight, as one with adapters.
        bias: The name of its bias, or None.
        transposed: Whether the parameter is ``(D, F)``, not ``(F, D)``.
        shape: ``(H, d)``.
        begin: At which of the ``F`` outputs the first head begins.
        step: After how many outputs the next head begins.
    """

    module: nn.Module
    weight: str | None
    bias: str | None
    transposed: bool
    shape: tuple[int, int]
    begin: int = 0
    step: int = 0

    @property
    def alone(self) -> bool:
        """Whether its module is a linear layer that makes nothing else."""
        heads, d = self.shape
        # One whose weight is found out must be as it is for that.
        return self.weight is not None and type(self.module) is nn.Linear and self.module.out_features == heads * d

    @property
    def certain(self) -> bool:
        """Whether its module makes nothing of rows but the affine map, whatever happens to it: others may do so only in other steps."""
        own = type(self.module) is nn.MultiheadAttention or (type(self.module) is nn.Linear and self.weight == "weight")
        return own and not self.module._forward_pre_hooks and "forward" not in vars(self.module)

    def affine(self, x: Tensor) -> Affine:
        """Its weight ``(H, d, D)`` and bias ``(H, 1, d)`` for rows like ``x``, with a graph to whatever parameters they are made of."""
        bias: Tensor | None = None
        if self.weight is None:
            weight, bias = _found_out(self.module, x)
        else:
            weight = getattr(self.module, self.weight)
            weight = weight.mT if self.transposed else weight
            bias = bias if self.bias is None else getattr(self.module, self.bias)
        return self._heads(weight), None if bias is None else self._heads(bias[:, None]).mT

    def _heads(self, weight: Tensor) -> Tensor:
        """Of a weight ``(F, D)`` the heads' part, ``(H, d, D)``."""
        heads, d = self.shape
        if self.step == d:
            return weight.narrow(0, self.begin, heads * d).unflatten(0, (heads, d))
        return weight.narrow(0, self.begin, (heads - 1) * self.step + d).unfold(0, d, self.step).mT


def _found_out(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``(F, D)`` and bias of an affine module, by what it makes of zero and of unit rows."""
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    out = module(F.pad(torch.eye(x.shape[-1], dtype=dtype, device=x.device), (0, 0, 1, 0))[None])[0]
    return (out[1:] - out[0]).mT, out[0]


def projection_of(
    heads: Tensor, x: Tensor, attention: nn.Module, entered: Mapping[Any, Any], made: Mapping[Any, Any]
) -> Projection | None:
    """The affine map within an attention module that made these heads ``(m, H, T, d)`` of rows ``x (m, T, D)``; None if there is none.

    ``entered`` and ``made`` are what modules were given and returned. A map of which anything else is trained than its weight and bias is none.
    """
    if not bool(heads.any()):  # of zeros nobody can tell where they come from
        return None
    trained = [p for p in attention.parameters() if p.requires_grad]
    reached = set[int]()
    if heads.requires_grad and trained:
        gradients = torch.autograd.grad(heads.sum(), trained, allow_unused=True, retain_graph=True)
        reached = {id(p) for p, g in zip(trained, gradients, strict=True) if g is not None}
    for candidate in _candidates(x, attention, entered, made):
        own = candidate.module.parameters(recurse=candidate.weight is None)
        with torch.no_grad(), suppress(Exception):  # what cannot be called with unit rows is no such map
            if reached <= {id(p) for p in own} and (found := _among_outputs(candidate, heads, x)) is not None:
                return found
    return None


def _candidates(
    x: Tensor, attention: nn.Module, entered: Mapping[Any, Any], made: Mapping[Any, Any]
) -> Iterator[Projection]:
    width = x.shape[-1]
    # What stands within another module that is given the rows, such as a layer with adapters, may not be all of it in the next step.
    around = [m for m in attention.modules() if m is not attention and entered.get(m) is x]
    within = {inner for module in around for inner in module.modules() if inner is not module}
    for module in (m for m in attention.modules() if m not in within):
        own = {name: p for name, p in module.named_parameters(recurse=False)}
        for name, p in own.items():
            for transposed in (False, True) if p.dim() == 2 else ():
                if p.shape[0 if transposed else 1] == width:
                    outputs = p.shape[1 if transposed else 0]
                    for bias in (*(n for n, b in own.items() if b.shape == (outputs,)), None):
                        yield Projection(module, name, bias, transposed, (1, outputs), 0, outputs)
    for module in around:
        out = made.get(module)
        if isinstance(out, Tensor) and out.shape[:2] == x.shape[:2]:
            yield Projection(module, None, None, False, (1, out.shape[-1]), 0, out.shape[-1])


def _among_outputs(candidate: Projection, heads: Tensor, x: Tensor) -> Projection | None:
    """The candidate with those of its outputs that the heads are, None if they are not among them."""
    _, count, _, d = heads.shape
    weight, bias = candidate.affine(x)
    out = F.linear(x.to(weight.dtype), weight[0], None if bias is None else bias[0, 0]).to(heads.dtype)
    total = out.shape[-1]
    if total < count * d:
        return None
    # One row says where each head would begin, all rows whether it does.
    distances = torch.cdist(
        heads[0, :, -1].float(), out[0, -1].float().unfold(0, d, 1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    begins: list[int] = distances.argmin(1).tolist()
    step = begins[1] - begins[0] if count > 1 else d
    if step < d or begins != list(range(begins[0], begins[0] + count * step, step)):
        return None
    found = replace(candidate, shape=(count, d), begin=begins[0], step=step)
    made = out[..., found.begin :].unfold(-1, d, step)[..., :count, :].transpose(1, 2)
    allowed = (1e-4 if heads.dtype.itemsize >= 4 else 3e-2) * float(heads.abs().max())
    return found if float((made - heads).abs().max()) <= allowed else None
