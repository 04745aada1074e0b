"""Every control draw in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from architectures import EXAMPLES
from torch import Tensor

import hf_lgp.call

CONTROLS = 2


def orders() -> list[tuple[Tensor, Tensor]]:
    """An order of the examples for every possible control set, and its inverse."""
    draws = itertools.combinations(range(EXAMPLES), CONTROLS)
    found = [torch.tensor([*draw, *(i for i in range(EXAMPLES) if i not in draw)]) for draw in draws]
    return [(order, order.argsort()) for order in found]


def every_draw(calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a step draw every control set in turn, every combination of them if it calls stacks several times."""
    for draws in itertools.product(orders(), repeat=calls):
        upcoming = iter(draws)
        monkeypatch.setattr(hf_lgp.call, "draw_order", lambda *_, upcoming=upcoming: next(upcoming))
        yield
