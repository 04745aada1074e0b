"""Per-example gradients of layers, against torch.func."""

import pytest
import torch
from torch import nn

from hf_lgp.linear.bases import Basis
from hf_lgp.linear.factored import find_layers, recorded

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 6, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (5, 3)),
    "norm": (lambda: nn.LayerNorm(3), (5, 6, 3)),
    "conv": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=(1, 2)), (5, 2, 8, 7)),
    "patches": (lambda: nn.Conv2d(2, 3, 4, stride=4, bias=False), (5, 2, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(3, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=3), (5, 3, 8, 7)),
}


def dense(factors):
    return factors[0].mT @ factors[1]


def recorded_gradients(module, x, count):
    layers, found = find_layers(module), {}
    with recorded(layers, len(x), count, torch.float64, lambda k, factors: found.__setitem__(k, factors)):
        out = module(x)
    assert not any(m._forward_hooks for m in module.modules())
    out.square().sum().backward()
    return layers, found


@pytest.mark.parametrize("name", LAYERS)
def test_against_torch_func(name):
    make, shape = LAYERS[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    (layer,), found = recorded_gradients(module, x, 4)

    def loss(parameters, one):
        return torch.func.functional_call(module, parameters, (one[None],)).square().sum()

    own = {name: p.detach() for name, p in module.named_parameters()}
    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x[:4])
    for i, matrix in enumerate(dense(found[0])):
        for got, name in zip(layer.gradients(matrix), own, strict=True):
            torch.testing.assert_close(got, expected[name][i])


@pytest.mark.parametrize("name", ["linear", "norm"])
def test_products_are_those_of_dense_gradients(name):
    make, shape = LAYERS[name]
    (layer,), found = recorded_gradients(make().double(), torch.randn(shape, dtype=torch.float64), 5)
    factors, formed = found[0], dense(found[0])
    left, right = torch.randn(layer.rows, 2, dtype=torch.float64), torch.randn(layer.cols, 2, dtype=torch.float64)
    basis = Basis(left, right, left.new_zeros(2, 2), left.new_zeros(2, 2))
    torch.testing.assert_close(basis.project(factors), (left.T @ formed @ right).flatten(1))
    centred = formed - formed.mean(0)
    products = basis.products(factors)
    torch.testing.assert_close(products[0], (centred @ centred.mT).mean(0) @ left)
    torch.testing.assert_close(products[1], (centred.mT @ centred).mean(0) @ right)


def test_rows_of_several_windows_belong_to_one_example():
    module, x = nn.Linear(3, 4).double(), torch.randn(10, 6, 3, dtype=torch.float64)
    layers, found = find_layers(module), []
    with recorded(layers, 5, 5, torch.float64, lambda _, factors: found.append(dense(factors))):
        module(x).square().sum().backward()
    torch.testing.assert_close(found[0].sum(0)[:, :-1], module.weight.grad)
    assert len(found[0]) == 5


def test_frozen_and_unknown_layers_are_left_out():
    module = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Embedding(3, 3), nn.Linear(3, 3))
    module[2].bias.requires_grad_(False)
    (layer,) = find_layers(module)
    assert layer.module is module[2] and len(layer.parameters) == 1 and layer.cols == 3
