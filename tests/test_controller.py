"""The controller decides from counts alone."""

from __future__ import annotations

import pytest

from hf_lgp.controller import Controller
from hf_lgp.settings import LGPSettings


def controller(**values: float) -> Controller:
    return Controller(LGPSettings(**{"window": 64, "warmup_examples": 32, "refit_steps": 3, **values}))  # type: ignore[arg-type]


def test_fraction_is_exact_until_ready() -> None:
    assert controller(control_fraction=0.5).fraction(ready=False) == 1.0
    assert controller(control_fraction=0.5).fraction(ready=True) == 0.5


@pytest.mark.parametrize("basis_steps", [1, 5, 32])
def test_bases_move_eagerly_and_then_at_intervals(basis_steps: int) -> None:
    decisions = controller(basis_steps=basis_steps)
    moved = []
    for step in range(100):
        if decisions.moves_bases:
            moved.append(step)
        decisions.advance()
    assert moved == sorted({*range(8), *range(0, 100, basis_steps)})
    assert decisions.seen == 100


def test_the_first_fit_waits_for_the_warmup() -> None:
    decisions = controller()
    for _ in range(10):
        decisions.advance()
    assert not decisions.refit_due(remembered=31, fitted=False, queue_full=True)
    assert decisions.refit_due(remembered=32, fitted=False, queue_full=False)


def test_refits_come_every_few_steps() -> None:
    decisions = controller()
    due = []
    for step in range(1, 10):
        decisions.advance()
        if decisions.refit_due(remembered=64, fitted=True, queue_full=False):
            decisions.refitted()
            due.append(step)
    assert due == [3, 6, 9]
    assert decisions.seen == 9


def test_a_full_queue_brings_the_refit_forward() -> None:
    decisions = controller()
    assert decisions.refit_due(remembered=64, fitted=True, queue_full=True)
    assert not decisions.refit_due(remembered=64, fitted=True, queue_full=False)


def test_state_is_restored() -> None:
    decisions, restored = controller(), controller()
    for _ in range(11):
        decisions.advance()
    decisions.refitted()
    decisions.advance()
    restored.load_state_dict(decisions.state_dict())
    assert restored.state_dict() == decisions.state_dict() == {"seen": 12, "since_fit": 1}
    for _ in range(2):
        assert not restored.refit_due(remembered=64, fitted=True, queue_full=False)
        restored.advance()
    assert restored.refit_due(remembered=64, fitted=True, queue_full=False)


def test_examples_are_taken_at_some_micro_batches_once_predictions_are_made() -> None:
    decisions = controller(observe_steps=3, basis_steps=20)
    taken, measured = [], []
    for step in range(60):
        assert decisions.observes(ready=False) and decisions.measures(ready=False)
        if decisions.observes(ready=True):
            taken.append(step)
        if decisions.measures(ready=True):
            measured.append(step)
        decisions.advance()
    assert set(measured) <= set(taken), "what is measured has to be observed"
    assert measured == sorted({*range(8), *range(0, 60, 4), *range(0, 60, 20)})
    assert taken == sorted({*measured, *range(0, 60, 3)})
