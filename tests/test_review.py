"""The review: processes agree on what was timed, whatever one of them did besides."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hf_lgp.alignment import Alignment
from hf_lgp.controller import Controller
from hf_lgp.costs import REHEARSED
from hf_lgp.exchange import Exchange
from hf_lgp.plans import EXACT, Plan
from hf_lgp.review import Review
from hf_lgp.settings import LGPSettings


class Recorded(Exchange):
    """Notes how much is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def average(self, parts: Sequence[Tensor]) -> None:
        (values,) = parts
        self.sizes.append(len(values))


def review(exchange: Recorded) -> Review:
    controller = Controller(LGPSettings().resolved(on_path=False), on_path=False)
    controller.seen = 1  # the first micro-batch of a run is not timed
    weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    return Review(controller, Alignment(2), weights, exchange, torch.device("cpu"))


def nothing(of: Review) -> None: ...


@pytest.mark.parametrize("between", [nothing, Review.end])
def test_the_number_of_readings_is_that_of_micro_batches(between: Callable[[Review], None]) -> None:
    """A callback of the first process may run the model, or a log of its own end a reading, before all save."""
    exchange = Recorded()
    own = review(exchange)
    for saves in (False, True, False):
        own.begin(False, 8, 16)
        between(own)
        if saves:
            own.end()
    own.end()
    own.now()
    assert exchange.sizes == [4 + 3]
    ((_, _, *seconds),) = own.controller.costs.state_dict()
    assert len(seconds) == 3


def test_predictions_dearer_than_exact_steps_are_known_at_once_but_not_among_several_processes() -> None:
    mine = review(Recorded())
    assert not mine.rehearsed_in_vain, "nothing is known yet"
    now = iter([0.0, 2.0, 0.0, 9.0, 0.0, 3.0])
    mine.stopwatch._now = lambda: next(now)  # type: ignore[method-assign]
    for plan in (EXACT, REHEARSED, REHEARSED):
        mine.stopwatch.start()
        mine.stopwatch.stop((plan, 1), 1.0)
    assert mine.rehearsed_in_vain
    mine.controller.costs.record(EXACT, 4.0)
    assert not mine.rehearsed_in_vain
    mine.controller.costs.record(EXACT, 1.0)
    mine.exchange.processes = 2
    assert not mine.rehearsed_in_vain


def test_what_was_timed_and_what_is_still_to_be_read_is_saved() -> None:
    own, restored = review(Recorded()), review(Recorded())
    own.stopwatch.load_state_dict([((Plan(0.25, ridge=True), 16), 16.0, 3.0)])
    own._staged = (
        [(EXACT, 16), (Plan(0.5), 16)],
        torch.tensor([0.7, 0.8, 0.6, 0.7, 1.0, 0.6], dtype=torch.float64),
        None,
    )
    restored.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert restored.state_dict() == own.state_dict()
    for each in (own, restored):
        each.now()
    assert restored.controller.state_dict() == own.controller.state_dict()
    assert restored.state_dict() == {"taken": [], "staged": []}
    assert len(own.controller.costs.state_dict()) == 3
