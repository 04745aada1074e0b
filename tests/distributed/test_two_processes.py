"""Real runs on two processes (gloo, CPU)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import two_processes
from launch import ACCELERATE, TORCHRUN, forked, on_two_processes
from tiny import TinyImages
from torch.utils.data import Subset
from two_processes import one_step

import hf_lgp.trainer
from hf_lgp.session import Session


@pytest.mark.parametrize("kind", ["fixed", "automatic", "batches_of_other_sizes", "listened_to_in_one"])
def test_ranks_stay_equal_and_decide_alike(kind: str, tmp_path: Path) -> None:
    assert forked(two_processes.main, str(tmp_path), kind, processes=2) == [0, 0]


def test_the_gradient_is_the_mean_of_what_each_rank_has_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forked(two_processes.main, str(tmp_path), "gradients", processes=2) == [0, 0]
    two, own = torch.load(tmp_path / "gradients.pt"), []
    for rank in (0, 1):
        monkeypatch.setattr(
            hf_lgp.trainer, "Session", lambda *args, rank=rank: partial(Session, process=rank)(*args[:3])
        )
        own.append(one_step(str(tmp_path), Subset(TinyImages(8), range(4 * rank, 4 * rank + 4))))
    assert two.keys() == own[0].keys() == own[1].keys()
    for name, gradient in two.items():
        torch.testing.assert_close(gradient, (own[0][name] + own[1][name]) / 2, rtol=1e-9, atol=1e-12, msg=name)


def test_each_rank_draws_control_examples_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparison above would hold for any draw."""
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(
            hf_lgp.trainer, "Session", lambda *args, rank=rank: partial(Session, process=rank)(*args[:3])
        )
        found.append(one_step(str(tmp_path), Subset(TinyImages(8), range(4))))
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.allclose(found[0][name], found[1][name], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "launcher"), [("fixed", TORCHRUN), ("unused_parameters_looked_for", ACCELERATE), ("compiled", TORCHRUN)]
)
def test_ranks_stay_equal_in_other_launches(kind: str, launcher: list[str], tmp_path: Path) -> None:
    output = on_two_processes("two_processes.py", str(tmp_path), kind, launcher=launcher)
    assert output.count(f"agrees in {kind}") == 2
