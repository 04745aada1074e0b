"""Settings: what is refused, and what a trainer's arguments turn into."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from hf_lgp.settings import LGPSettings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("control_fraction", -0.1, r"`lgp_control_fraction` must lie in \[0, 1\], got -0.1. Use 1 for plain"),
        ("control_fraction", 1.5, r"`lgp_control_fraction` must lie in \[0, 1\], got 1.5"),
        ("control_fraction", math.nan, r"`lgp_control_fraction`"),
        ("variance_budget", 1.0, "`lgp_variance_budget` must exceed 1, .* got 1.0. Use `lgp_control_fraction=1`"),
        ("variance_budget", math.nan, "`lgp_variance_budget` must exceed 1"),
        ("exact_steps", -1, "`lgp_exact_steps` must not be negative, got -1"),
        ("window", 0, "`lgp_window` must be at least 1, got 0"),
        ("rank", -3, "`lgp_rank` must be at least 1, got -3"),
        ("warmup_examples", -1, "`lgp_warmup_examples` must be at least 1, or 0 to choose"),
        ("observe_steps", -1, "`lgp_observe_steps` must be at least 1, or 0 to choose"),
        ("refit_steps", -1, "`lgp_refit_steps` must be at least 1"),
        ("basis_steps", -2, "`lgp_basis_steps` must be at least 1"),
        ("observe_examples", 1, "`lgp_observe_examples` must be at least 2 .* got 1"),
        ("ridge", 0.0, "`lgp_ridge` must be positive, got 0.0"),
        ("ridge", math.nan, "`lgp_ridge` must be positive"),
        ("kernel", "cubic", "`lgp_kernel` must be one of linear, rbf, got 'cubic'"),
        ("warmup_examples", 10**6, r"`lgp_warmup_examples` \(1000000\) cannot exceed `lgp_window` \(\d+\): lower"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LGPSettings(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"control_fraction": 1.0},
        {"control_fraction": 0.0, "variance_budget": 0.0},
        {"control_fraction": 1e-3},
        {"window": 1, "warmup_examples": 1},
        {"window": 8, "warmup_examples": 8},
        {"observe_examples": 2},
        {"kernel": "linear", "ridge": 1e-9},
    ],
)
def test_values_at_the_limits_are_accepted(values: dict[str, Any]) -> None:
    settings = LGPSettings(**values)
    assert {name: getattr(settings, name) for name in values} == values


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LGPSettings().rank = 3  # type: ignore[misc]


def test_from_arguments_reads_prefixed_attributes_only() -> None:
    arguments = SimpleNamespace(lgp_rank=4, lgp_kernel="linear", lgp_unknown=1, window=3, seed=9)
    assert LGPSettings.from_arguments(arguments) == LGPSettings(rank=4, kernel="linear")


def test_from_arguments_validates() -> None:
    with pytest.raises(ValueError, match="lgp_window"):
        LGPSettings.from_arguments(SimpleNamespace(lgp_window=0))


def test_every_setting_can_be_read_from_arguments() -> None:
    values = {
        "control_fraction": 0.5,
        "variance_budget": 2.0,
        "exact_steps": 7,
        "window": 64,
        "rank": 3,
        "kernel": "linear",
        "ridge": 0.5,
        "memory_steps": 100,
        "warmup_examples": 32,
        "observe_examples": 8,
        "observe_steps": 3,
        "refit_steps": 2,
        "basis_steps": 5,
        "class_path": False,
        "seed": 7,
        "head": "classifier",
    }
    settings = LGPSettings.from_arguments(SimpleNamespace(**{f"lgp_{name}": value for name, value in values.items()}))
    assert dataclasses.asdict(settings) == values
    defaults = dataclasses.asdict(LGPSettings())
    assert not any(value == defaults[name] for name, value in values.items()), "a default proves nothing"


def test_a_tenth_of_a_short_run_begins_exactly() -> None:
    assert [LGPSettings().exact_steps_of(steps) for steps in (5, 60, 375, 1000, 100_000)] == [0, 6, 37, 100, 100]
    assert LGPSettings(exact_steps=0).exact_steps_of(1000) == 0
    assert LGPSettings(exact_steps=300).exact_steps_of(200) == 300


def test_zero_leaves_the_choice_to_whether_there_is_a_path() -> None:
    def chosen(on_path: bool, **values: Any) -> tuple[int, ...]:
        settings = LGPSettings(**values).resolved(on_path)
        return settings.observe_steps, settings.refit_steps, settings.basis_steps, settings.warmup_examples

    assert chosen(True) == (8, 16, 16, 128)
    assert chosen(True, control_fraction=0.25) == (8, 16, 16, 512)
    assert chosen(False) == (1, 4, 12, 512)
    assert chosen(True, window=100)[-1] == chosen(False, window=100)[-1] == 100
    own = LGPSettings(observe_steps=3, refit_steps=5, basis_steps=7, warmup_examples=99, rank=4)
    assert own.resolved(on_path=True) == own.resolved(on_path=False) == own
