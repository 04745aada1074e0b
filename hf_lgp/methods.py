"""The two ways to predict gradients, each ready for one model: the row walk and the paper's linear predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .control.measurement import GroupSpread
from .control.plan import StepPlan
from .linear.predictor import LinearPredictor
from .linear.trunk import find_trunk, spliced_trunk
from .rows.leaves import Run, run_eagerly
from .rows.parts import Intercept, UnknownBlock
from .rows.walk import HowToWalk, RowBudget
from .settings import LGPSettings
from .stack import Stack, find_stacks, spliced
from .verify import evaluating, refusing, unrandom, verified


@dataclass(frozen=True)
class RowWalk:
    """Gradients predicted by the walk through verified stacks."""

    stacks: tuple[Stack, ...]
    how: HowToWalk
    which: tuple[int, ...]  # of the model's stacks these are

    ready, learns = True, False

    @property
    def has_first_row(self) -> bool:
        """Whether some stack's last block can be run on the first row only."""
        return any(stack.first_row_only for stack in self.stacks)

    @property
    def found(self) -> float:
        """Which stacks it has, and of which the first row only is read, as one number."""
        return sum((1.0 + stack.first_row_only) * 3**k for k, stack in zip(self.which, self.stacks, strict=True))

    def splice(self, plan: StepPlan, observed: Callable[[GroupSpread], None]) -> AbstractContextManager[None]:
        """A context in which the model follows a plan."""
        return spliced(self.stacks, plan, self.how, observed)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def row_walk(
    model: nn.Module,
    loss: Callable[[int], Any],
    count: int,
    budget: RowBudget,
    intercept: Intercept,
    half: bool,
    run: Run = run_eagerly,
) -> RowWalk:
    """The row walk for a model, found and verified with ``count`` examples; ``run`` calls functions of blocks in training.

    Raises:
        UnknownBlock: If its gradients cannot be predicted that way; the message says why.
    """
    with refusing(), evaluating(model), unrandom():
        stacks = find_stacks(model, lambda: loss(count), lambda: loss(count // 2), intercept)
    how = HowToWalk(budget, intercept)

    def checked(stacks: Sequence[Stack]) -> tuple[tuple[Stack, ...], HowToWalk]:
        return verified(model, stacks, lambda: loss(count), how, half)

    def passes(stack: Stack) -> bool:
        try:
            return bool(checked([stack]))
        except UnknownBlock:
            return False

    which = tuple(range(len(stacks)))
    try:
        stacks, how = checked(stacks)
    except UnknownBlock as reason:
        # Perhaps it needs as many rows as there are, such as one that makes a bias for each pair; or of several stacks some can be spliced.
        on_all = tuple(replace(s, parts=tuple(replace(part, on_few=False) for part in s.parts)) for s in stacks)
        which = tuple(k for k in which if len(stacks) > 1 and passes(on_all[k])) or which
        kept = tuple(on_all[k] for k in which)
        if kept == stacks:
            raise
        try:
            stacks, how = checked(kept)
        except UnknownBlock:
            raise reason from None
    return RowWalk(stacks, replace(how, run=run), which)


class LinearMethod(LinearPredictor):
    """Gradients predicted by the paper's linear map, the model's trunk being spliced at its call.

    Raises:
        UnknownBlock: If a model's gradients cannot be predicted that way; the message says why.
    """

    has_first_row, learns = False, True

    def __init__(self, model: nn.Module, settings: LGPSettings) -> None:
        self.trunk = find_trunk(model)
        super().__init__(self.trunk, settings, torch.promote_types(torch.float32, next(self.trunk.parameters()).dtype))

    def splice(self, plan: StepPlan, observed: Callable[[GroupSpread], None]) -> AbstractContextManager[None]:
        """A context in which the model follows a plan, and the predictor learns."""
        return spliced_trunk(self.trunk, plan, self, observed)


Method = RowWalk | LinearMethod
"""A way to predict gradients, ready for one model."""
