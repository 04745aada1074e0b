"""A model copied, pickled, saved or averaged in the middle of training carries nothing of this package."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments
from tiny import TinyImages, tiny_vit
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback

from hf_lgp import LGPTrainer


def pickled(model: nn.Module) -> tuple[nn.Module, int]:
    data = pickle.dumps(model)
    return pickle.loads(data), len(data)


def saved(model: nn.Module) -> tuple[nn.Module, int]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    size = buffer.tell()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False), size


HOW: dict[str, Callable[[nn.Module], tuple[nn.Module, int]]] = {
    "deepcopy": lambda model: (copy.deepcopy(model), 0),
    "pickle": pickled,
    "torch.save": saved,
    "AveragedModel": lambda model: ((average := AveragedModel(model)).module, pickled(average)[1]),
}


class Copying(TrainerCallback):
    def __init__(self, how: str) -> None:
        self.copy_of, self.copies, self.kind = HOW[how], [], type(None)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kind = type(model)
        self.copies.append(self.copy_of(model))


@pytest.mark.parametrize("how", HOW)
def test_copies_are_those_of_trainer(how: str, tmp_path: Path) -> None:
    data, found = TinyImages(32, dtype=torch.float32), []
    for base in (Trainer, LGPTrainer):
        copying = Copying(how)
        args = arguments(tmp_path, base, max_steps=3)
        trainer = base(tiny_vit(torch.float32), args, train_dataset=data, callbacks=[copying])
        trainer.train()
        found.append(copying)
    assert trainer._lgp_steps["predicted"] == 3
    plain, predicted = found
    assert [size for _, size in predicted.copies] == [size for _, size in plain.copies], "bytes"
    for (one, _), (other, _) in zip(plain.copies, predicted.copies, strict=True):
        assert type(one) is type(other) is plain.kind is predicted.kind
        for ours, theirs in zip(other.modules(), one.modules(), strict=True):
            assert type(ours) is type(theirs) and ours.__dict__.keys() == theirs.__dict__.keys()
            assert "forward" not in ours.__dict__ and not ours._forward_hooks and not ours._forward_pre_hooks
            assert not ours._backward_hooks and not ours._backward_pre_hooks
        other(**data.batch(0, 8)).loss.backward()
        assert all(p.grad is not None for p in other.vit.layers.parameters())
