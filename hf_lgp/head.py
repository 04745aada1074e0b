"""Finding the classification head: the one linear layer whose output is the model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class HeadNotFoundError(ValueError):
    """No linear layer, or more than one, produces the model's logits."""


def named_head(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer with the given qualified name.

    Raises:
        HeadNotFoundError: If there is no such module or it is not an ``nn.Linear``.
    """
    modules = dict(model.named_modules())
    head = modules.get(name)
    if isinstance(head, nn.Linear):
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
        HeadNotFoundError: If the outputs carry no logits or the head is not unique.
    """
    outputs: dict[str, Tensor] = {}
    handles = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Linear):

            def note(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach()

            handles.append(module.register_forward_hook(note))
    try:
        result = forward()
    finally:
        for handle in handles:
            handle.remove()
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
