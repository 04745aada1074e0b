"""One run: what is planned, counted, measured and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_lgp.session
from hf_lgp.control.controller import Controller
from hf_lgp.control.measurement import GroupSpread
from hf_lgp.control.plan import StepPlan
from hf_lgp.session import Session
from hf_lgp.settings import LGPSettings

CPU = torch.device("cpu")


class Noted:
    """A method that writes down the plans it is given, and measures a share of a tenth."""

    has_first_row, ready, learns = True, True, False

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.loaded: Mapping[str, Tensor] = {}

    @contextmanager
    def splice(self, plan: StepPlan, observed: Callable[[GroupSpread], None]) -> Iterator[None]:
        self.plans.append(plan)
        yield
        if plan.measure:
            observed(GroupSpread(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])))

    def state_dict(self) -> dict[str, Tensor]:
        return {"window": torch.ones(2)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.loaded = state


def session_of(**settings: Any) -> tuple[Session, Noted]:
    session, method = (
        Session(
            LGPSettings(**{"exact_steps": 0 if "control_fraction" in settings else 4, **settings}),
            steps=400,
            device=CPU,
        ),
        Noted(),
    )
    assert session.use(method, None, 0, 16) is None
    return session, method


def run(session: Session, start: int, stop: int, examples: int = 16) -> list[StepPlan]:
    plans = []
    for step in range(start, stop):
        plans.append(session.plan(step, 1))
        with session.step(plans[-1], examples, 100.0):
            pass
    return plans


def test_a_fixed_fraction_is_followed_counted_and_measured() -> None:
    session, method = session_of(control_fraction=0.5)
    plans = run(session, 0, 80)
    assert method.plans == plans and {plan.fraction for plan in plans} == {0.5}
    assert session.steps == {"exact": 0, "predicted": 80}
    assert len({plan.seed for plan in plans}) == 80
    figures = session.figures()
    assert figures["fraction"] == 0.5 and figures["variance_explained"] == pytest.approx(0.9)
    assert figures["variance"] == pytest.approx(1.1)


def test_micro_batches_of_one_step_draw_by_themselves_and_always_the_same() -> None:
    seeds = [[session_of(control_fraction=0.5)[0].plan(7, 2).seed for _ in range(2)] for _ in range(2)]
    assert seeds[0][0] == seeds[1][0]
    session = session_of(control_fraction=0.5)[0]
    assert session.plan(7, 2).seed != session.plan(7, 2).seed
    other = Session(LGPSettings(control_fraction=0.5), 400, CPU, process=1)
    other.use(Noted(), None, 0, 8)
    assert other.plan(7, 2).seed not in seeds[0]


def test_a_step_that_fails_is_not_counted() -> None:
    session, _ = session_of(control_fraction=0.5)
    with pytest.raises(ValueError, match="lost"), session.step(session.plan(0, 1), 8, 1.0):
        raise ValueError("lost")
    assert session.steps == {"exact": 0, "predicted": 0} and session.controller.seen == 0


def test_plans_do_not_depend_on_a_process_s_own_examples_and_what_is_exact_is_counted() -> None:
    """All processes follow the same plan; a batch too small for its fraction has all its examples as control examples."""
    sessions = [session_of(control_fraction=0.5)[0] for _ in range(2)]
    plans = [run(session, 0, 40, examples) for session, examples in zip(sessions, (16, 1), strict=True)]
    assert plans[0] == plans[1] and any(plan.measure for plan in plans[0])
    assert sessions[0].steps == {"exact": 0, "predicted": 40} and sessions[1].steps == {"exact": 40, "predicted": 0}


def test_where_no_batch_has_two_examples_the_check_is_tried_less_and_less() -> None:
    session = Session(LGPSettings(), 400, CPU)
    asked = [k for k in range(1, 200) if session.unchecked(7)]
    assert asked == [*range(1, 9), 64, 128, 192]
    session.use(None, "it has no blocks", 7, 4)
    assert not session.unchecked(7) and session.unchecked(8)


def test_a_plain_step_is_not_spliced() -> None:
    session, method = session_of()
    with session.step(StepPlan(), 8, 1.0):
        pass
    assert method.plans == [] and session.steps["exact"] == 1


def test_without_a_method_every_step_is_plain_and_the_fraction_is_all_that_is_logged() -> None:
    session = Session(LGPSettings(), 400, CPU)
    assert session.use(None, "it has no blocks", 0, 16) == "it has no blocks"
    assert run(session, 0, 20) == [StepPlan()] * 20
    assert session.figures() == {"fraction": 1.0} and session.steps["exact"] == 20


@pytest.mark.parametrize("stop", [37, 40, 45])
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(stop: int) -> None:
    straight, _ = session_of(control_fraction=0.25)
    expected = run(straight, 0, 100)
    first, _ = session_of(control_fraction=0.25)
    plans = run(first, 0, stop)
    tensors, numbers = first.state_dict()
    second, method = Session(LGPSettings(control_fraction=0.25), 400, CPU), Noted()
    second.load_state_dict(tensors, json.loads(json.dumps(numbers)))
    second.use(method, None, 0, 16)
    assert plans + run(second, stop, 100) == expected and "window" in method.loaded
    assert (second.steps, second.examples) == (straight.steps, straight.examples)
    one, other = straight.controller, second.controller
    assert (one.seen, one.residuals) == (other.seen, other.residuals)


@pytest.mark.parametrize("every", [8, 16])
def test_saving_where_decisions_are_made_puts_none_off(every: int) -> None:
    session, _ = session_of(variance_budget=0, exact_steps=0)
    for start in range(0, 80, every):
        run(session, start, start + every)
        session.state_dict()
    assert session.controller.asked_at or session.controller.fraction < 1.0


def test_what_was_measured_of_another_predictor_is_forgotten() -> None:
    first, _ = session_of(exact_steps=0)
    run(first, 0, 40)
    tensors, numbers = first.state_dict()
    for settings, seen in ((LGPSettings(), 40), (LGPSettings(groups=4), 0), (LGPSettings(predictor="linear"), 0)):
        second = Session(settings, 400, CPU)
        second.load_state_dict(tensors, json.loads(json.dumps(numbers)))
        assert second.controller.seen == seen and second.steps == first.steps


def test_what_the_linear_predictor_learnt_with_another_kernel_is_not_loaded() -> None:
    first, _ = session_of(predictor="linear")
    tensors, numbers = first.state_dict()
    for kernel, loaded in ((first.settings.kernel, True), ("linear", False)):
        second, method = Session(LGPSettings(predictor="linear", kernel=kernel), 400, CPU), Noted()
        second.load_state_dict(tensors, json.loads(json.dumps(numbers)))
        second.use(method, None, 0, 16)
        assert ("window" in method.loaded) == loaded


def test_what_was_learnt_with_other_settings_is_learnt_anew() -> None:
    class Refusing(Noted):
        def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
            raise ValueError("another window")

    first, _ = session_of()
    run(first, 0, 20)
    second = Session(LGPSettings(), 400, CPU)
    second.load_state_dict(*first.state_dict())
    assert second.use(Refusing(), None, 0, 16) is None and second.controller.seen == 0


def test_small_last_batches_tell_nothing_of_times_and_shares() -> None:
    session, _ = session_of()
    run(session, 0, 7)
    plan = StepPlan(measure=8)
    with session.step(plan, 3, 10.0):
        pass
    run(session, 8, 9)
    assert session.controller.times.count(plan) == 0 and session.controller.measurements == 0
    assert session.examples["exact"] == 8 * 16 + 3


def test_batches_of_few_long_examples_are_timed() -> None:
    """Batches of as much work each, whatever the number of examples."""
    session, _ = session_of()
    run(session, 0, 7, examples=64)
    with session.step(StepPlan(), 8, 100.0):
        pass
    assert session._readings[-1].whole


def test_the_state_of_another_version_is_refused() -> None:
    with pytest.raises(KeyError):
        Session(LGPSettings(), 400, CPU).load_state_dict({}, {"seen": 3, "lookout": {}})


def test_a_state_that_lacks_something_leaves_nothing_of_itself() -> None:
    first, _ = session_of(control_fraction=0.25)
    run(first, 0, 20)
    numbers = first.state_dict()[1]
    del numbers["examples"]
    second, _ = session_of(control_fraction=0.25)
    with pytest.raises(KeyError):
        second.load_state_dict({}, numbers)
    assert second.controller.seen == 0 and sum(second.steps.values()) == 0


def test_shares_of_a_run_are_told_once_something_was_predicted() -> None:
    session, _ = session_of(control_fraction=0.25)
    assert session.shares() == {}
    run(session, 0, 8)
    assert session.shares() == {"steps_predicted": 1.0, "examples_predicted": 0.75}


def test_steps_that_were_skipped_do_not_count_nor_measure() -> None:
    """Two micro-batches a step; the measuring one is in a step that loss scaling skips."""
    session, _ = session_of(control_fraction=0.5)
    for step in range(20):
        for _ in range(2):
            plan = session.plan(step, 2, skipped=step == 17)  # told after step 16, whose first micro-batch is the 33rd
            assert (plan.measure > 0) == (step == 16 and session.controller.seen == 32)
            with session.step(plan, 16, 100.0):
                pass
    assert session.steps == {"exact": 0, "predicted": 38}
    assert session.examples == {"exact": 38 * 8, "predicted": 38 * 8}
    assert session.controller.measurements == 0 and session.controller.seen == 40


def test_a_run_that_rests_counts_its_steps_and_asks_for_no_plan() -> None:
    session, method = session_of()
    session.controller = Controller(seen=16, look_at=200)
    while session.rests():
        session.rested(session.steps["exact"], 16)
    assert session.controller.seen == 200 - 16 and method.plans == []
    assert session.steps["exact"] == 200 - 32 and session.examples["exact"] == 16 * (200 - 32)
    session.refuse("a reason")
    assert not session.rests()


def test_a_rest_that_ends_within_an_optimizer_step_counts_its_micro_batches() -> None:
    session, _ = session_of()
    session.controller = Controller(seen=16, look_at=200)
    for micro_batch in range(8):
        assert session.rests()
        session.rested(micro_batch // 3, 16)
    session.plan(2, 3)
    assert not session.first_of_step


def test_a_method_that_is_refused_is_let_go_and_checked_again_with_other_parameters_only() -> None:
    session, _ = session_of()
    session.refuse("it fails")
    assert session.method is None and session.refused == session.reason == "it fails"
    assert "window" not in session.state_dict()[0]
    seen = [session.unchecked(trained) for trained in (0, 5, 0, 5)]
    assert seen == [False, True, False, True]
    session.use(None, "it fails", 5, 16)
    assert not any(session.unchecked(trained) for trained in (0, 5, 0, 5))


def test_exact_steps_before_a_fixed_fraction_are_logged_as_such() -> None:
    session, _ = session_of(control_fraction=0.5)
    session.settings = replace(session.settings, exact_steps=40)
    run(session, 0, 40)
    assert session.figures() == {"fraction": 1.0} and session.steps == {"exact": 40, "predicted": 0}
    run(session, 40, 60)
    assert session.figures()["fraction"] == 0.5 and "step_time" not in session.figures() and session.saved is None


def test_a_run_whose_batches_never_came_says_so() -> None:
    assert "no batch of two examples" in str(Session(LGPSettings(), 400, CPU).reason)


def test_nothing_is_timed_where_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(LGPSettings(), 400, CPU)
    session.use(None, "it has no blocks", 0, 16)
    monkeypatch.setattr(hf_lgp.session, "mark", lambda _: pytest.fail("the device is waited for"))
    run(session, 0, 3)


def test_nothing_is_measured_before_the_method_is_ready() -> None:
    session, method = session_of(exact_steps=0)
    method.ready, method.learns = False, True
    assert not any(plan.measure for plan in run(session, 0, 16))
    method.ready = True
    assert [plan.measure for plan in run(session, 16, 24)] == [0] * 6 + [2, 8]
