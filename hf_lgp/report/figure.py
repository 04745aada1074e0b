"""A figure of one training run, drawn from the trainer's log: losses, control fraction, and how well gradients were predicted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

FIGURE_NAME = "lgp.png"

_LOSS, _EVALUATION, _FRACTION, _RHO2 = "#4477aa", "#ee6677", "#222222", "#228833"
"""Colours that stay apart for colour-blind readers and in grey."""


def draw_history(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draw losses, control fraction and variance explained over the steps of a run.

    Raises:
        OSError: If the file cannot be written.
    """
    fraction = series(log_history, "lgp/fraction")
    rho2 = series([entry for entry in log_history if entry.get("lgp/variance_explained")], "lgp/variance_explained")
    if not rho2[0]:
        return False
    try:
        from matplotlib.figure import Figure  # never pyplot: its state and backend are the user's
    except ImportError:
        return False
    figure = Figure(figsize=(7.0, 4.6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    upper.plot(*series(log_history, "loss"), color=_LOSS, linewidth=1.2, label="training loss")
    evaluations = series(log_history, "eval_loss")
    if evaluations[0]:
        upper.plot(*evaluations, color=_EVALUATION, marker="o", markersize=3.5, linewidth=1.2, label="evaluation loss")
    upper.set_ylabel("loss")
    lower.step(*fraction, where="post", color=_FRACTION, linewidth=1.2, label="control fraction")
    lower.plot(*rho2, color=_RHO2, marker=".", markersize=4, linewidth=1.0, label="variance explained")
    lower.set_ylim(min(0.0, *rho2[1]) - 0.03, 1.03)
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def series(log_history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one reading, in the order of the log.

    Entries without a step count as taken at the step before them.
    """
    steps, values, step = [], [], 0.0
    for entry in log_history:
        step = entry.get("step", step)
        value = entry.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(step)
            values.append(float(value))
    return steps, values
