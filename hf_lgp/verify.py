"""Trust, but verify: before anything is predicted, the spliced model must do on a few examples what the model does.

With every example a control example, the loss and every parameter's gradient must be the model's own; with half of them, the loss and the gradients behind the stacks. This
one check replaces every table of supported models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from .control.plan import StepPlan
from .rows.parts import UnknownBlock
from .rows.walk import HowToWalk
from .sealed import SpliceError
from .splice import Spliced, no_gradient_taken
from .stack import Stack, spliced

_WIDE, _HALF = (1e-3, 1e-3), (5e-2, 1e-2)
"""Differences allowed, relative to a tensor's norm, and which share of the largest tensor's norm it counts at least: float32 and half precision."""

_MEMORY = ("out of memory", "not enough memory", "allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")
"""What errors say that a smaller batch may cure."""


class _Ran(NamedTuple):
    """What one run of the model gave, in the order of its trained parameters."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]


def verified(
    model: nn.Module, stacks: Sequence[Stack], loss: Callable[[], Tensor], how: HowToWalk, half: bool = False
) -> tuple[tuple[Stack, ...], HowToWalk]:
    """The stacks, each with what was learnt of whether only the first row of its output is read; and whether blocks can be run on all groups at once.

    Raises:
        UnknownBlock: If the spliced model differs from the model; the message says in what.
    """
    allowed, least = _HALF if half else _WIDE
    how = replace(how, loud=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(stacks: Sequence[Stack], plan: StepPlan, cut: bool = False) -> _Ran:
        """Loss and gradients; if ``cut``, without the stacks' own, so that there are none before and within them."""
        with refusing(), unrandom(), spliced(stacks, plan, how):
            with no_gradient_taken():
                value = loss()
            scaled = value * 1024.0 if half else value  # or small gradients would be rounding in fp16
            with patch.object(Spliced, "backward", _nothing) if cut else nullcontext():
                return _Ran(value.detach(), torch.autograd.grad(scaled, parameters, allow_unused=True))

    def alike(gradients: Sequence[Tensor | None], expected: Sequence[Tensor | None], times: float = 1.0) -> bool:
        largest = max((float(g.norm()) for g in expected if g is not None), default=0.0)
        pairs = ([torch.zeros(()) if g is None else g for g in pair] for pair in zip(gradients, expected, strict=True))
        return all(float((a - b).norm()) <= times * allowed * max(float(b.norm()), least * largest) for a, b in pairs)

    def difference(stacks: Sequence[Stack], plan: StepPlan, plain: _Ran, times: float = 1.0) -> str | None:
        """How the spliced model differs, None if it does not."""
        try:
            own = run(stacks, plan)
        except UnknownBlock as error:
            return str(error)
        if not _close(own.loss, plain.loss, allowed):
            return "its loss is another one when its blocks are run by themselves"
        if not alike(own.gradients, plain.gradients, times):
            return "its gradient is another one when its blocks are run by themselves"
        return None

    all_control, by_group = StepPlan(all_control=True), StepPlan(measure=2, first_row=True)
    with evaluating(model):
        plain = run((), all_control)
        stacks = [replace(stack, first_row_only=False) for stack in stacks]
        if (reason := difference(stacks, all_control, plain)) is not None:
            raise UnknownBlock(reason)
        whole, split = (run(stacks, plan, cut=True) for plan in (all_control, StepPlan(0.5)))
        # A new head may be zero: then its loss tells nothing of what it reads, but its gradient does.
        if not _close(split.loss, plain.loss, allowed) or not alike(split.gradients, whole.gradients):
            raise UnknownBlock(
                "its loss is another one when only some examples have a graph: its blocks do not treat examples independently"
            )
        for k, stack in enumerate(stacks):
            trial = [*stacks[:k], replace(stack, first_row_only=True), *stacks[k + 1 :]]
            # What a dropout before attention does to other rows, the first cannot know.
            if not stack.parts[-1].before and difference(trial, replace(all_control, first_row=True), plain) is None:
                stacks = trial
        vectorized = difference(stacks, by_group, plain, 4.0) is None  # `torch.vmap` has many ways to refuse
        model.train()  # some do what they do not do in evaluation; with one stream, random numbers are drawn as by the model
        blocks = [part.block for stack in stacks for part in stack.parts]
        with unchanged(*blocks, put_back=True) as moved:
            with unchanged(model):
                plain = run((), all_control)
            with unchanged(model):
                reason = difference(stacks, all_control, plain)
            # Some models never do the same twice, such as those with a random stream of their own.
            if reason is not None and _close(run((), all_control).loss, plain.loss, allowed):
                raise UnknownBlock(reason)
            predicted = run(stacks, StepPlan(0.5, first_row=True)).gradients
            if not all(bool(g.isfinite().all()) for g in predicted if g is not None):
                raise UnknownBlock("the predicted gradients of its blocks are not finite")
            try:
                run(stacks, by_group) if vectorized else None
            except UnknownBlock:
                vectorized = False
        if moved:
            raise UnknownBlock(f"its blocks keep statistics of what passes through them, `{moved[0]}`")
    return tuple(stacks), replace(how, vectorized=vectorized, loud=False)


def _nothing(ctx: Any, *deltas: Tensor | None) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a device or of the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _MEMORY)


@contextmanager
def refusing() -> Iterator[None]:
    """A context in which whatever goes wrong is a reason not to predict, unless memory runs out."""
    try:
        yield
    except UnknownBlock:
        raise
    except SpliceError as error:
        raise UnknownBlock(str(error)) from error
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UnknownBlock(f"running it in parts raises {type(error).__name__}: {error}") from error


@contextmanager
def unchanged(*modules: nn.Module, put_back: bool = False) -> Iterator[list[str]]:
    """A context after which buffers have the values that they had; names those that had others.

    What was replaced is put back only if so wanted, as other attributes may go with it.
    """
    each = [(m, name, b) for module in modules for m in module.modules() for name, b in m._buffers.items()]
    held = [(m, name, b, b.clone()) for m, name, b in each if b is not None and not b.is_meta]
    moved: list[str] = []
    try:
        yield moved
    finally:  # also where memory runs out
        with torch.no_grad():
            for module, name, buffer, before in held:
                kept = torch.equal(buffer, before)
                moved += [] if kept and module._buffers.get(name) is buffer else [name]
                if not kept:
                    buffer.copy_(before)
                if put_back:
                    module._buffers[name] = buffer


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """A context in which parameters have no gradients, and after which they have those that they had."""
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in held:
            p.grad = None
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient


def _close(value: Tensor, expected: Tensor, allowed: float) -> bool:
    return bool((value - expected).abs() <= allowed * expected.abs().clamp(min=1e-3))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode: runs that are compared must not draw different dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unrandom() -> Iterator[None]:
    """A context with the same random numbers at every entry, which leaves all streams as they were."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = None if accelerator is None else torch.get_device_module(accelerator)
    before = random.getstate(), np.random.get_state(), None if module is None else module.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if module is not None:
            module.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            if module is not None:
                module.set_rng_state(before[2])
            random.setstate(before[0])
            np.random.set_state(before[1])
