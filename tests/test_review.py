"""The review: processes agree on what was timed, whatever one of them did besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hf_lgp.alignment import Alignment
from hf_lgp.controller import Controller
from hf_lgp.exchange import Exchange
from hf_lgp.plans import EXACT
from hf_lgp.review import Review
from hf_lgp.settings import LGPSettings


class Recorded(Exchange):
    """Notes what is averaged; other processes could time nothing at the positions given."""

    def __init__(self, voided: Sequence[int] = ()) -> None:
        super().__init__()
        self.voided, self.sizes = voided, []

    def average(self, parts: Sequence[Tensor]) -> None:
        (values,) = parts
        self.sizes.append(len(values))
        for position in self.voided:
            values[4 + position] = math.nan


def review(exchange: Recorded) -> Review:
    controller = Controller(LGPSettings().resolved(on_path=False), on_path=False)
    controller.seen = 1  # the first micro-batch of a run is not timed
    weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    return Review(controller, Alignment(2), weights, exchange, torch.device("cpu"))


def nothing(of: Review) -> None: ...


@pytest.mark.parametrize("between", [nothing, Review.end, Review.interrupt])
def test_the_number_of_readings_is_that_of_micro_batches(between: Callable[[Review], None]) -> None:
    """A callback of the first process may run the model, or a log of its own end a reading, before all save."""
    exchange = Recorded()
    own = review(exchange)
    for saves in (False, True, False):
        own.begin(False, 8, 16)
        between(own)
        if saves:
            own.interrupt()
    own.end()
    own.now()
    assert exchange.sizes == [4 + 3]
    timed = len(own.controller.costs.state_dict()[0]) - 2 if own.controller.costs.state_dict() else 0
    assert timed == {nothing: 2, Review.end: 3, Review.interrupt: 0}[between]


def test_what_another_process_could_not_time_does_not_count() -> None:
    own = review(Recorded(voided=[1]))
    for _ in range(3):
        own.begin(False, 8, 16)
    own.end()
    own.now()
    ((_, _, *seconds),) = own.controller.costs.state_dict()
    assert len(seconds) == 2 and own.controller.costs.seconds(EXACT) is not None


def test_an_interrupted_reading_is_left_out_of_a_checkpoint() -> None:
    own = review(Recorded())
    for interrupted in (False, True, False):
        own.begin(False, 8, 16)
        if interrupted:
            own.interrupt()
    own.end()
    assert len(own.state_dict()) == 2
    assert all(math.isfinite(seconds) for *_, seconds in own.state_dict())
