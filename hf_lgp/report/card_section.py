"""The model card's section on what predicted gradients did in a run: text from the trainer's log and the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from .._version import __version__
from ..settings import LGPSettings
from .citations import BIBTEX
from .figure import series

MOST_PHASES = 6
"""Rows of the table at most: shorter phases are merged into their neighbours."""

_INTRODUCTION = (
    f"Trained with `LGPTrainer` of hf_lgp {__version__}: `transformers.Trainer`, except that only a share of every "
    "micro-batch, the control fraction, gets exact gradients. The gradients of the other examples are predicted, and the "
    "exact ones correct the predictions, so the expected gradient is that of plain training "
    "([arXiv 2511.05187](https://arxiv.org/abs/2511.05187))."
)


@dataclass
class Phase:
    """Consecutive log entries with about one control fraction.

    Attributes:
        entries: The entries, in order; never empty.
    """

    entries: list[Mapping[str, Any]]

    @property
    def last(self) -> int:
        """The step at which the phase ends."""
        return int(self.entries[-1].get("step", 0))

    def span(self, name: str) -> str:
        """The reading's value, or its smallest and largest; n/a if there is none."""
        values = series(self.entries, name)[1]
        if not values:
            return "n/a"
        low, high = number(min(values)), number(max(values))
        return low if low == high else f"{low}-{high}"

    def mean(self, name: str) -> str:
        """The reading's mean over the entries; n/a if there is none."""
        values = series(self.entries, name)[1]
        return number(sum(values) / len(values)) if values else "n/a"


def section(
    log_history: Sequence[Mapping[str, Any]], settings: LGPSettings, model_class: str, source: str, figure: str | None
) -> str:
    """Markdown of the whole section, from its heading on, without a line break at the end.

    Args:
        log_history: ``TrainerState.log_history``.
        settings: The settings that the run was started with.
        model_class: Class of ``transformers`` that loads the model.
        source: Repository or folder that the model is loaded from.
        figure: Link to the run's figure, relative to the card; None if there is none.
    """
    parts = ["## Linear gradient prediction", _INTRODUCTION]
    readings = [entry for entry in log_history if "lgp/fraction" in entry]
    if readings:
        # What an entry says of the fraction holds from there on; its other readings are of the steps before it.
        before = [readings[0], *readings[:-1]]
        shifted = [
            {**entry, "lgp/fraction": earlier["lgp/fraction"]} for earlier, entry in zip(before, readings, strict=True)
        ]
        parts += [
            _phase_table(phases([entry for entry in shifted if "train_runtime" not in entry])),
            _summary(readings),
        ]
    elif settings.control_fraction == 1.0:
        parts.append("In this run every gradient was exact: the control fraction was 1.")
    else:
        parts.append("The log of this run holds no readings of predictions.")
    if figure is not None:
        parts.append(f"![Loss, control fraction and variance explained over the steps of the run]({figure})")
    parts += ["### Settings", _settings_list(settings), "### Loading"]
    parts.append(
        "A plain transformers checkpoint; hf_lgp is not needed.\n\n"
        f'```python\nfrom transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("{source}")\n```'
    )
    parts += ["### Citation", f"```bibtex\n{BIBTEX}```"]
    return "\n\n".join(parts)


def phases(readings: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Split log entries where the control fraction changes, and merge the shortest phases while there are too many.

    Args:
        readings: Log entries with ``lgp/fraction``, that of the steps before the entry.
    """
    result: list[Phase] = []
    for entry in readings:
        if result and result[-1].entries[-1]["lgp/fraction"] == entry["lgp/fraction"]:
            result[-1].entries.append(entry)
        else:
            result.append(Phase([entry]))
    while len(result) > MOST_PHASES:
        lengths = [len(one.entries) + len(other.entries) for one, other in pairwise(result)]
        at = lengths.index(min(lengths))
        result[at : at + 2] = [Phase(result[at].entries + result[at + 1].entries)]
    return result


def _phase_table(parts: Sequence[Phase]) -> str:
    rows = ["| steps | control fraction | mean variance explained | mean training loss |", "| --- | --- | --- | --- |"]
    first = 1
    for phase in parts:
        measured = Phase([entry for entry in phase.entries if entry.get("lgp/variance_explained")])
        rows.append(
            f"| {first:,}-{phase.last:,} | {phase.span('lgp/fraction')} | {measured.mean('lgp/variance_explained')} | {phase.mean('loss')} |"
        )
        first = phase.last + 1
    return "\n".join(rows)


def _summary(readings: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    if rho2 := [value for value in series(readings, "lgp/variance_explained")[1] if value]:
        lines.append(
            "share of the gradient's variance that predictions explain: "
            f"{number(rho2[-1])} at the end, {number(sum(rho2) / len(rho2))} on average"
        )
    if saved := series(readings, "lgp/seconds_saved")[1]:
        verb = "saved" if saved[-1] >= 0 else "lost"
        lines.append(f"time {verb} against plain training, as estimated while training: {duration(abs(saved[-1]))}")
    return "\n".join(f"- {line}" for line in lines)


def _settings_list(settings: LGPSettings) -> str:
    default = LGPSettings()
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    shown = [
        f"- `lgp_{name}`: {value}{' (chosen while training)' if name == 'control_fraction' and value == 0 else ''}"
        for name, value in values.items()
        if name == "control_fraction" or value != getattr(default, name)
    ]
    return "\n".join([*shown, "", "All other `lgp_*` settings have their defaults."])


def number(value: float) -> str:
    """Three significant digits, in plain notation for what is neither tiny nor huge."""
    return f"{value:.3g}" if math.isfinite(value) else "n/a"


def duration(seconds: float) -> str:
    """Seconds as words, in the two largest units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
