"""Settings: what is refused, and what a trainer's arguments turn into."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_lgp import LGPTrainingArguments
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
        ("window", 1, "`lgp_window` must be at least 2, got 1"),
        ("groups", 0, "`lgp_groups` must be at least 1, got 0"),
        ("single_rows", -1, "`lgp_single_rows` must be at least 0, got -1"),
        ("rank", -3, "`lgp_rank` must be at least 1, got -3"),
        ("ridge", 0.0, "`lgp_ridge` must be positive, got 0.0"),
        ("ridge", math.nan, "`lgp_ridge` must be positive"),
        ("kernel", "cubic", "`lgp_kernel` must be one of linear, rbf, got 'cubic'"),
        ("predictor", "path", "`lgp_predictor` must be one of auto, rows, linear, got 'path'"),
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
        {"window": 2, "rank": 1, "groups": 1},
        {"exact_steps": 0, "predictor": "linear"},
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
        "predictor": "rows",
        "groups": 8,
        "single_rows": 3,
        "seed": 7,
    }
    settings = LGPSettings.from_arguments(SimpleNamespace(**{f"lgp_{name}": value for name, value in values.items()}))
    assert dataclasses.asdict(settings) == values
    defaults = dataclasses.asdict(LGPSettings())
    assert not any(value == defaults[name] for name, value in values.items()), "a default proves nothing"


@pytest.mark.parametrize(
    ("values", "demanded"),
    [
        ({}, False),
        ({"control_fraction": 0.0}, False),
        ({"control_fraction": 1.0}, False),
        ({"control_fraction": 0.25}, True),
        ({"predictor": "rows"}, True),
        ({"predictor": "linear"}, True),
    ],
)
def test_a_fixed_fraction_or_a_named_predictor_is_a_demand(values: dict[str, Any], demanded: bool) -> None:
    assert LGPSettings(**values).demanded == demanded


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lgp_control_fraction": -0.1}, "lgp_control_fraction"), ({"lgp_kernel": "poly"}, "linear, rbf")],
)
def test_bad_values_fail_when_arguments_are_made(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LGPTrainingArguments(str(tmp_path), use_cpu=True, **settings)


def test_arguments_have_a_field_for_every_setting_with_its_default(tmp_path: Path) -> None:
    own = {f.name.removeprefix("lgp_"): f.default for f in dataclasses.fields(LGPTrainingArguments) if "lgp_" in f.name}
    assert own == dataclasses.asdict(LGPSettings())
    values = json.loads(LGPTrainingArguments(str(tmp_path), use_cpu=True, lgp_groups=8).to_json_string())
    assert values["lgp_groups"] == 8 and values["lgp_kernel"] == "rbf"
