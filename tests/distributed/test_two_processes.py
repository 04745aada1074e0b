"""Real runs on two processes (gloo, CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ACCELERATE, TORCHRUN, on_two_processes
from oracle_trainer import OracleTrainer, every_case
from oracle_trajectory import trained

import hf_lgp.trainer
from hf_lgp.draws import draw_control, private_seed


@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("plain", TORCHRUN),
        ("automatic", TORCHRUN),
        ("unused parameters looked for", ACCELERATE),
        ("compiled", TORCHRUN),
    ],
    ids=["torchrun", "torchrun, automatic fraction", "accelerate, unused parameters looked for", "torchrun, compiled"],
)
def test_ranks_stay_equal_with_predictions_and_accumulation(kind: str, launcher: list[str], tmp_path: Path) -> None:
    output = on_two_processes("two_processes.py", str(tmp_path), kind, launcher=launcher)
    assert output.count("agrees") == 2


@pytest.mark.parametrize("extent", ["a part", pytest.param("every", marks=pytest.mark.slow)])
def test_oracle_gradients_are_those_of_plain_training_on_two_processes(extent: str, tmp_path: Path) -> None:
    output = on_two_processes("oracle_two_processes.py", str(tmp_path), extent, timeout=900)
    count = len(every_case()) if extent == "every" else len(every_case()) // 5 + 1
    assert output.count(f"agrees in {count} combinations") == 2


class GlobalDraw(OracleTrainer):
    """One process that draws the control examples two processes of half the batch would draw."""

    def _lgp_seed(self) -> int:
        seed = super()._lgp_seed()
        place = self._lgp_micro_batch
        self.seeds = [private_seed(self._lgp_settings.seed, *place, process) for process in (0, 1)]
        return seed

    def draw(self, examples: int, controls: int, seed: int, labelled: Any = None) -> tuple[torch.Tensor, float]:
        half = examples // 2
        orders = [draw_control(half, controls // 2, seed)[0] + half * i for i, seed in enumerate(self.seeds)]
        parts = [order[: controls // 2] for order in orders] + [order[controls // 2 :] for order in orders]
        return torch.cat(parts), examples / controls


def test_two_processes_are_one_with_the_same_global_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums in another order: float64 keeps some twelve digits over twenty steps."""
    on_two_processes("oracle_trajectory.py", str(tmp_path))
    two = torch.load(tmp_path / "trained.pt")
    made: list[GlobalDraw] = []

    class Remembered(GlobalDraw):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(hf_lgp.trainer, "draw_control", lambda *args: made[0].draw(*args))
    one = trained(Remembered, str(tmp_path), batch=8)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-6)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-9, atol=1e-11, msg=name)
