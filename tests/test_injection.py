"""The spliced head against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lgp.injection import Splice, splice_head


def parts() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor, Tensor]:
    trunk, head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    return trunk, head, x, labels, torch.tensor([4, 1, 0, 5, 2, 3])


def spliced_loss(trunk: nn.Linear, head: nn.Linear, x: Tensor, labels: Tensor, order: Tensor, correction) -> Tensor:
    with torch.no_grad():
        rest = trunk(x[order[2:]])
        splice = Splice(rest, head(rest), order, 3.0, correction)
    features = trunk(x[order[:2]])
    logits = splice_head(head, features, head(features), splice, list(trunk.parameters()))
    return nn.functional.cross_entropy(logits, labels)


def test_value_and_head_gradient_are_those_of_the_whole_batch_and_the_trunk_gets_the_control_part() -> None:
    trunk, head, x, labels, order = parts()
    plain = nn.functional.cross_entropy(head(trunk(x)), labels)
    exact = torch.autograd.grad(plain, [*head.parameters()])
    losses = nn.functional.cross_entropy(head(trunk(x)), labels, reduction="none") / 6
    control = torch.autograd.grad(3.0 * losses[order[:2]].sum(), [*trunk.parameters()])
    loss = spliced_loss(trunk, head, x, labels, order, lambda *_: [None, None])
    torch.testing.assert_close(loss, plain)
    got = torch.autograd.grad(loss, [*head.parameters(), *trunk.parameters()])
    for actual, expected in zip(got, [*exact, *control], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_corrections_are_added_and_see_scaled_residuals_control_first() -> None:
    trunk, head, x, labels, order = parts()
    seen: dict[str, Tensor] = {}

    def correction(features: Tensor, residuals: Tensor, pullbacks: Tensor) -> list[Tensor]:
        seen.update(features=features, residuals=residuals, pullbacks=pullbacks)
        return [torch.full_like(p, 7.0) for p in trunk.parameters()]

    base = torch.autograd.grad(
        spliced_loss(trunk, head, x, labels, order, lambda *_: [None, None]), [*trunk.parameters()]
    )
    loss = 128.0 * spliced_loss(trunk, head, x, labels, order, correction)
    moved = torch.autograd.grad(loss, [*trunk.parameters()])
    for actual, before in zip(moved, base, strict=True):
        torch.testing.assert_close(actual, 128.0 * before + 7.0)
    logits = head(trunk(x)).detach().requires_grad_()
    (residuals,) = torch.autograd.grad(128.0 * nn.functional.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(seen["residuals"], residuals[order])
    torch.testing.assert_close(seen["pullbacks"], residuals[order] @ head.weight)
    torch.testing.assert_close(seen["features"], trunk(x[order]))


def test_a_head_without_bias_and_a_frozen_head_work() -> None:
    trunk, _, x, labels, order = parts()
    head = nn.Linear(4, 2, bias=False).double()
    head.requires_grad_(False)
    spliced_loss(trunk, head, x, labels, order, lambda *_: [None, None]).backward()
    assert head.weight.grad is None and trunk.weight.grad is not None


def test_sequences_at_the_head_are_refused() -> None:
    head = nn.Linear(4, 2)
    rows = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="lgp_head"):
        splice_head(head, rows, head(rows), Splice(rows, rows, torch.arange(4), 2.0, lambda *_: []), [])
