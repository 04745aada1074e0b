"""Finding the classification head: the one linear layer whose output is the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class HeadNotFoundError(ValueError):
    """No linear layer, or more than one, produces the model's logits."""


def named_head(model: nn.Module, name: str, forward: Callable[[], Any]) -> nn.Linear:
    """The linear layer with the given qualified name.

    Args:
        model: The user's model.
        name: Where the head is.
        forward: Runs the model on a small batch.

    Raises:
        HeadNotFoundError: If there is no such module, it is not an ``nn.Linear``, or its output is not one row per example.
    """
    modules = dict(model.named_modules())
    head = modules.get(name)
    if isinstance(head, nn.Linear):
        _, outputs = _linear_outputs({name: head}, forward)
        _refuse_rows(outputs.get(name), name)
        return head
    linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
    found = f"is a {type(head).__name__}" if head is not None else "does not exist"
    raise HeadNotFoundError(
        f"`lgp_head={name!r}` {found}; it must name an nn.Linear. The last candidates are: {', '.join(linear[-5:]) or 'none'}."
    )


def find_head(model: nn.Module, forward: Callable[[], Any]) -> tuple[str, nn.Linear]:
    """Find the classification head by a probe forward.

    Args:
        model: The user's model.
        forward: Runs the model on a small batch and returns its outputs, with the logits under ``"logits"``.

    Returns:
        The head's qualified name and module: the only ``nn.Linear`` whose output equals the logits.

    Raises:
        HeadNotFoundError: If the outputs carry no logits, not one row of them per example, or the head is not unique.
    """
    modules = dict(model.named_modules())
    result, outputs = _linear_outputs(modules, forward)
    logits = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor):
        raise HeadNotFoundError(
            "The model's outputs carry no `logits` tensor, so its classification head cannot be found. "
            "Name it with `lgp_head`, or use `lgp_control_fraction=1`."
        )
    matching = [
        name
        for name, output in outputs.items()
        if output.shape == logits.shape and torch.equal(output.to(logits.dtype), logits.detach())
    ]
    if len(matching) == 1:
        _refuse_rows(outputs[matching[0]], matching[0])
        head = modules[matching[0]]
        assert isinstance(head, nn.Linear)
        return matching[0], head
    same_width = [name for name, output in outputs.items() if output.shape[-1] == logits.shape[-1]]
    candidates = matching or same_width or list(outputs)[-5:]
    raise HeadNotFoundError(
        f"{'Several linear layers equal' if matching else 'No linear layer equals'} the model's logits of shape "
        f"{tuple(logits.shape)}. Candidates: {', '.join(candidates) or 'none'}. Name the right one with `lgp_head`, or use "
        "`lgp_control_fraction=1` to train exactly."
    )


def _linear_outputs(modules: Mapping[str, nn.Module], forward: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What ``forward`` returns, and what the linear layers among the modules returned in it."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):

            def note(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach()

            handles.append(module.register_forward_hook(note))
    try:
        return forward(), outputs
    finally:
        for handle in handles:
            handle.remove()


def _refuse_rows(output: Tensor | None, name: str) -> None:
    """Refuse a head that gives a row per token or per box instead of one per example, or that did not run."""
    if output is None:
        raise HeadNotFoundError(
            f"The head `{name}` takes no part in the model's forward. Name another with `lgp_head`."
        )
    if output.dim() != 2:
        raise HeadNotFoundError(
            f"The head `{name}` gives outputs of shape {tuple(output.shape)}, but predictions need one row per example: models that "
            "label tokens, pixels or boxes, and language models, cannot be predicted. Use `lgp_control_fraction=1`."
        )
