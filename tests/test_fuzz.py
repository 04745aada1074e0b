"""Arbitrary valid settings train without errors, infinities or traces; arbitrary invalid ones are refused by name."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from fuzzing import check_run, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_lgp.settings import LGPSettings

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@given(runs())
@settings(max_examples=30, **QUIET)
def test_any_valid_settings_train(run: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_run(run, folder)


@pytest.mark.slow
@given(runs())
@settings(max_examples=400, **QUIET)
def test_many_valid_settings_train(run: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_run(run, folder)


_TOO_SMALL = {
    name: st.integers(-1000, bound)
    for name, bound in (
        ("window", 0),
        ("rank", 0),
        ("memory_steps", 0),
        ("warmup_examples", -1),
        ("observe_examples", 1),
        ("observe_steps", -1),
        ("refit_steps", -1),
        ("basis_steps", -1),
    )
}
_OUT_OF_RANGE = {
    **_TOO_SMALL,
    "control_fraction": st.one_of(st.floats(max_value=-1e-9), st.floats(1.0, exclude_min=True), st.just(float("nan"))),
    "ridge": st.one_of(st.floats(max_value=0.0), st.just(float("nan"))),
    "kernel": st.text().filter(lambda name: name not in ("linear", "rbf")),
}


@pytest.mark.parametrize("name", _OUT_OF_RANGE)
@given(st.data())
@settings(max_examples=50, **QUIET)
def test_any_value_out_of_range_is_refused_by_name(name: str, data: st.DataObject) -> None:
    value = data.draw(_OUT_OF_RANGE[name])
    with pytest.raises(ValueError, match=f"`lgp_{name}`"):
        LGPSettings(**{name: value})
