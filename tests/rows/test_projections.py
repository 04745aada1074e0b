"""What makes keys and values is found by what it computes, and only where nothing else that is trained has a part in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lgp.rows.projections import Projection, projection_of

M, T, WIDTH, H, D = 2, 3, 6, 2, 4


class Of(nn.Module):
    """An attention module that makes heads in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        outputs = {"fused": 3, "interleaved": 3}.get(way, 1) * H * D
        self.layer: nn.Module = Conv1D(outputs, WIDTH) if way == "transposed" else nn.Linear(WIDTH, outputs)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * H * D, WIDTH)) if way == "parameter" else None
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "parameter":
            out = F.linear(x, self.in_proj_weight)[..., 8:16]
        else:
            out = self.layer(x)
        if self.way == "fused":
            out = out[..., 8:16]
        if self.way == "interleaved":
            return out.view(M, T, H, 3, D)[..., 1, :].transpose(1, 2)
        if self.way == "copied":
            out = out.contiguous().clone()
        heads = out.view(M, T, H, D).transpose(1, 2)
        return heads * 2.0 if self.way == "scaled" else heads


def found_in(module: nn.Module, x: Tensor) -> tuple[Projection | None, Tensor]:
    entered: dict[Any, Any] = {}
    made: dict[Any, Any] = {}

    def after(module: nn.Module, args: Any, out: Any) -> None:
        entered[module], made[module] = args[0], out

    hooks = [m.register_forward_hook(after) for m in module.modules()]
    heads = module(x)
    for hook in hooks:
        hook.remove()
    return projection_of(heads, x, module, entered, made), heads


@pytest.mark.parametrize("way", ["alone", "fused", "interleaved", "transposed", "parameter", "copied"])
def test_the_affine_map_gives_the_heads(way: str) -> None:
    x = torch.randn(M, T, WIDTH)
    found, heads = found_in(Of(way), x)
    assert found is not None and found.alone == (way in ("alone", "copied"))
    weight, bias = found.affine(x)
    assert weight.shape == (H, D, WIDTH) and weight.requires_grad
    again = torch.einsum("mtw,hdw->mhtd", x, weight) + (0 if bias is None else bias)
    torch.testing.assert_close(again, heads)


class Together(nn.Module):
    """Layers in a module of their own, which returns what they make side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.key, self.inner.value = (nn.Linear(WIDTH, H * D) for _ in range(2))
        self.inner.forward = lambda x: (self.inner.key(x), self.inner.value(x))  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[1].view(M, T, H, D).transpose(1, 2)  # type: ignore[no-any-return]


def test_the_weights_of_layers_side_by_side_are_found_out_while_they_are_as_they_are() -> None:
    """They may be a part of what makes keys and values in another step."""
    module, x = Together(), torch.randn(M, T, WIDTH)
    found, heads = found_in(module, x)
    assert found is not None and found.module is module.inner.value
    assert not found.alone and not found.certain
    weight, bias = found.affine(x)
    torch.testing.assert_close(torch.einsum("mtw,hdw->mhtd", x, weight) + bias, heads)


def test_what_is_done_to_heads_afterwards_is_no_affine_map_of_a_layer() -> None:
    assert found_in(Of("scaled"), torch.randn(M, T, WIDTH))[0] is None


def test_zeros_have_no_origin() -> None:
    module = Of("fused")
    nn.init.zeros_(module.layer.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.layer.bias)  # type: ignore[arg-type]
    assert found_in(module, torch.randn(M, T, WIDTH))[0] is None


class Adapted(nn.Module):
    """A layer with an adapter, as those of peft."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, H * D).requires_grad_(False)
        self.dropout, self.down, self.up = nn.Dropout(0.5), nn.Linear(WIDTH, 2), nn.Linear(2, H * D, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


def test_a_layer_with_an_adapter_is_called_even_while_the_adapter_does_nothing() -> None:
    """Folding its base layer alone would leave the adapter without a gradient."""
    x = torch.randn(M, T, WIDTH)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = Adapted()

        def forward(self, x: Tensor) -> Tensor:
            return self.keys(x).view(M, T, H, D).transpose(1, 2)

    module = Attention().eval()
    found = found_in(module, x)[0]
    assert found is not None and found.module is module.keys and found.weight is None
    weight, _ = found.affine(x)
    (gradient,) = torch.autograd.grad(weight.square().sum(), module.keys.up.weight)
    assert float(gradient.abs().max()) > 0
