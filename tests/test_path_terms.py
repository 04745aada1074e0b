"""Path terms: what they sum and what they say example by example, against gradients written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lgp.path_terms import DenseTerm, HeadsTerm, PathTerm, RowTerm
from hf_lgp.rules import BroadcastRule, ConvRule, LayerNormRule, LinearRule, Rule, ScaleRule

EXAMPLES = 5
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_rule(inputs: int, outputs: int, biased: bool, frozen_bias: bool = False) -> LinearRule:
    module = nn.Linear(inputs, outputs, bias=biased or frozen_bias).double()
    if frozen_bias:
        module.bias.requires_grad_(False)
    return LinearRule("linear", module)


def assert_consistent(term: PathTerm, rule: Rule, expected: Tensor, seed: int = 0) -> None:
    """Factors are the expected matrices, in every slice, and the total is their weighted sum as parameter gradients."""
    examples = len(expected)
    for chosen in (slice(None), slice(0, 2), slice(1, examples)):
        factors = term.factors(chosen)
        assert (factors.rows, factors.cols) == (rule.rows, rule.cols)
        torch.testing.assert_close(factors.dense(), expected[chosen])
    weights = randn(examples, seed=seed + 100)
    summed = rule.gradients(torch.einsum("i,irc->rc", weights, term.factors(slice(None)).dense()))
    total = term.total(weights)
    assert len(total) == len(rule.parameters)
    for gradient, parameter, reference in zip(total, rule.parameters, summed, strict=True):
        assert gradient.numel() == parameter.numel()
        torch.testing.assert_close(gradient.view(parameter.shape), reference)


@quick
@given(rows=st.integers(1, 4), biased=st.booleans(), seed=seeds)
def test_rows(rows: int, biased: bool, seed: int) -> None:
    left, right = randn(EXAMPLES, rows, 3, seed=seed), randn(EXAMPLES, rows, 4, seed=seed + 1)
    expected = torch.zeros(EXAMPLES, 3, 4 + biased, dtype=torch.float64)
    for i in range(EXAMPLES):
        for s in range(rows):
            expected[i] += torch.outer(left[i, s], torch.cat([right[i, s], right.new_ones(int(biased))]))
    assert_consistent(RowTerm(left, right, biased), linear_rule(4, 3, biased), expected, seed)


@quick
@given(
    queries=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.integers(1, 3),
    biased=st.booleans(),
    is_key=st.booleans(),
    seed=seeds,
)
def test_heads(queries: int, heads: int, size: int, biased: bool, is_key: bool, seed: int) -> None:
    left, right = randn(EXAMPLES, queries, heads, size, seed=seed), randn(EXAMPLES, queries, heads, 4, seed=seed + 1)
    expected = torch.zeros(EXAMPLES, heads * size, 4 + biased, dtype=torch.float64)
    for i in range(EXAMPLES):
        for q, h in itertools.product(range(queries), range(heads)):
            bias = right.new_full((int(biased),), 0.0 if is_key else 1.0)
            expected[i, h * size : (h + 1) * size] += torch.outer(left[i, q, h], torch.cat([right[i, q, h], bias]))
    term = HeadsTerm(left, right, biased, bias_is_zero=is_key)
    assert_consistent(term, linear_rule(4, heads * size, biased), expected, seed)


@pytest.mark.parametrize("kind", ["rows", "heads"])
def test_a_frozen_bias_has_no_place(kind: str) -> None:
    rule = linear_rule(4, 6, biased=False, frozen_bias=True)
    left, right = randn(EXAMPLES, 2, 6 if kind == "rows" else 3, seed=0), randn(EXAMPLES, 2, 4, seed=1)
    term = RowTerm(left, right, False) if kind == "rows" else HeadsTerm(left[:, None], right[:, None], False, False)
    matrices = left.mT @ right if kind == "rows" else torch.einsum("iho,ihd->ihod", left, right).flatten(1, 2)
    assert_consistent(term, rule, matrices)


def test_a_norms_two_rows() -> None:
    norm = nn.LayerNorm(4).double()
    gradients = randn(EXAMPLES, 2, 4, seed=0)
    assert_consistent(
        DenseTerm(gradients, (norm.weight.shape, norm.bias.shape)), LayerNormRule("norm", norm), gradients
    )


def test_a_table() -> None:
    table = nn.Parameter(randn(1, 3, 4, seed=0))
    gradients = randn(EXAMPLES, 3, 4, seed=1)
    assert_consistent(DenseTerm(gradients, (table.shape,)), BroadcastRule("table", nn.Module(), table), gradients)


def test_a_layer_scale() -> None:
    scale = nn.Parameter(randn(4, seed=0))
    gradients = randn(EXAMPLES, 1, 4, seed=1)
    assert_consistent(DenseTerm(gradients, (scale.shape,)), ScaleRule("scale", nn.Module(), scale), gradients)


@pytest.mark.parametrize("biased", [False, True])
def test_a_patch_embedding_is_a_layer_on_unfolded_rows(biased: bool) -> None:
    convolution = nn.Conv2d(2, 3, 2, stride=2, bias=biased).double()
    rule = ConvRule("patches", convolution)
    pixels, delta = randn(EXAMPLES, 2, 4, 4, seed=0), randn(EXAMPLES, 3, 2, 2, seed=1)
    matrices = []
    for i in range(EXAMPLES):
        convolution.zero_grad()
        (convolution(pixels[i : i + 1]) * delta[i]).sum().backward()
        flat = [p.grad.reshape(3, -1) for p in convolution.parameters() if p.grad is not None]
        matrices.append(torch.cat(flat, dim=1))
    term = RowTerm(delta.flatten(2).mT, rule.patches(pixels), biased)
    assert_consistent(term, rule, torch.stack(matrices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "heads", "table"])
def test_totals_have_the_terms_own_dtype(kind: str, dtype: torch.dtype) -> None:
    left, right = randn(EXAMPLES, 2, 3, seed=0), randn(EXAMPLES, 2, 4, seed=1)

    def term(cast: torch.dtype) -> PathTerm:
        if kind == "rows":
            return RowTerm(left.to(cast), right.to(cast), True)
        if kind == "heads":
            return HeadsTerm(left[:, None].to(cast), right[:, None].to(cast), True, False)
        return DenseTerm(right.to(cast), (torch.Size([2, 4]),))

    weights = randn(EXAMPLES, seed=2)
    for narrow, wide in zip(term(dtype).total(weights), term(torch.float64).total(weights), strict=True):
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.double(), wide, rtol=0.05, atol=0.1)
