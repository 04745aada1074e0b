"""What ``time_to_accuracy.py`` reports of its runs, and the figure.

A run's accuracy between two evaluations is interpolated linearly; it reaches a target when that line first does, which is
the same for the line and for its running maximum. Targets are accuracies of plain ``Trainer`` itself, after some epochs and at the
end, each seed against its own ``Trainer`` run, or all seeds against the mean. A run that never reaches a target counts as
infinitely slow in medians and resamples, and shows as null.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

BASELINE = "trainer"
Cell = dict[str, Any]


def column(cell: Cell, name: str) -> np.ndarray:
    """One quantity of a run's evaluations."""
    return np.array([point[name] for point in cell["curve"]])


def first_reached(cell: Cell, target: float, name: str) -> float:
    """Seconds or step at which the interpolated accuracy first reaches the target; infinity if never."""
    accuracy, where = column(cell, "accuracy"), column(cell, name)
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return math.inf
    after = int(reached[0])
    if after == 0:
        return float(where[0])
    share = (target - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    return float(where[after - 1] + share * (where[after] - where[after - 1]))


def interval(values: list[float], resamples: int = 10_000) -> list[float | None] | None:
    """95% percentile bootstrap interval of the median; of few seeds, little more than their range."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).choice(np.array(values), (resamples, len(values)))
    # Not interpolated: between a number and infinity there is nothing.
    ends = np.quantile(np.median(drawn, axis=1), [0.025, 0.975], method="nearest")
    return [finite(float(end)) for end in ends]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def ratios(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    """Ratios to the baseline at the same seed; seeds at which the baseline has no finite value are left out."""
    single = {seed: mine[seed] / theirs[seed] for seed in mine if 0 < theirs.get(seed, math.inf) < math.inf}
    values = list(single.values())
    return {
        "median_ratio": finite(statistics.median(values)) if values else None,
        "interval_95": interval(values),
        "ratios": {str(seed): finite(value) for seed, value in single.items()},
    }


def differences(mine: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    """Mean, and paired differences to the baseline with their standard error."""
    values, paired = list(mine.values()), [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    several = len(paired) > 1
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "difference": statistics.fmean(paired) if paired else None,
        "standard_error": statistics.stdev(paired) / math.sqrt(len(paired)) if several else None,
        "differences": paired,
    }


def by_seed(cells: list[Cell], arm: str) -> dict[int, Cell]:
    return {cell["seed"]: cell for cell in cells if cell["arm"] == arm}


def targets(plain: dict[int, Cell], target_epochs: list[float], epochs: float) -> dict[str, dict[int, float]]:
    """Accuracies to reach, by name and seed; the primary target first."""
    found: dict[str, dict[int, float]] = {}
    after = [
        (f"after {epoch:g} epoch{'s' * (epoch != 1)}", epoch / epochs)
        for epoch in reversed(target_epochs)
        if epoch < epochs
    ]
    for when, part in [*after, ("at the end", 1.0)]:
        own = {
            s: float(np.interp(part * c["steps"], column(c, "step"), column(c, "accuracy"))) for s, c in plain.items()
        }
        found[f"accuracy of Trainer {when}"] = own
        found[f"mean accuracy of Trainer {when}"] = dict.fromkeys(own, statistics.fmean(own.values()))
    return found


def summarise(cells: list[Cell], target_epochs: list[float], epochs: float, batch: int) -> dict[str, Any]:
    """Everything that is reported, by arm; seeds of which plain training is not there yet are left out of comparisons."""
    plain = by_seed(cells, BASELINE)
    if not plain:
        return {"primary_target": None, "targets": {}, "arms": {}}
    wanted = targets(plain, target_epochs, epochs)
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        mine = by_seed(cells, arm)
        to_targets = {}
        for name, accuracy in wanted.items():
            seeds = [seed for seed in mine if seed in plain]
            took, base = (
                {seed: first_reached(of[seed], accuracy[seed], "seconds") for seed in seeds} for of in (mine, plain)
            )
            seen, base_seen = (
                {seed: of[seed].get("batch", batch) * first_reached(of[seed], accuracy[seed], "step") for seed in seeds}
                for of in (mine, plain)
            )
            to_targets[name] = {
                "seconds": {str(seed): finite(value) for seed, value in took.items()},
                **ratios(took, base),
                "examples": {str(seed): finite(value) for seed, value in seen.items()},
                "examples_median_ratio": ratios(seen, base_seen)["median_ratio"],
            }
        equal_time = {}
        for part in (0.25, 0.5, 0.75, 1.0):
            at = [
                {
                    seed: float(np.interp(part * plain[seed]["seconds"], column(c, "seconds"), column(c, "accuracy")))
                    for seed, c in of.items()
                    if seed in plain
                }
                for of in (mine, plain)
            ]
            if at[0]:
                equal_time[f"{part:.0%} of Trainer's time"] = differences(*at)
        totals = [{seed: c["seconds"] for seed, c in of.items()} for of in (mine, plain)]
        processor = [{seed: c["process_seconds"] for seed, c in of.items()} for of in (mine, plain)]
        # The first step compiles, or builds the predictor.
        rest = [(c["seconds"] - c["first_step_seconds"]) / max(1, c["steps"] - 1) for c in mine.values()]
        arms[arm] = {
            "seeds": sorted(mine),
            "to_target": to_targets,
            "at_equal_time": equal_time,
            "final_accuracy": differences(
                *({seed: c["final"]["accuracy"] for seed, c in of.items()} for of in (mine, plain))
            ),
            "total_seconds": {"mean": statistics.fmean(totals[0].values()), **ratios(*totals)},
            "process_seconds": {"mean": statistics.fmean(processor[0].values()), **ratios(*processor)},
            "seconds_per_step": statistics.fmean(c["seconds"] / c["steps"] for c in mine.values()),
            "seconds_per_step_after_the_first": statistics.fmean(rest),
            "peak_memory_mib": statistics.fmean(c["peak_memory_mib"] for c in mine.values()),
        }
    return {"primary_target": next(iter(wanted)), "targets": wanted, "arms": arms}


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against seconds, and how the control fraction and the share explained went."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figure", flush=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["cells"]
    predicted = [arm for arm in dict.fromkeys(c["arm"] for c in cells) if arm != BASELINE]
    shown = "lgp" if "lgp" in predicted else next(iter(predicted), None)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for arm, label, colour in ((BASELINE, "Trainer", "C0"), (shown, f"LGPTrainer ({shown})", "C1")):
        mine = list(by_seed(cells, arm).values()) if arm else []
        if not mine:
            continue
        seconds = np.mean([column(c, "seconds") for c in mine], axis=0)
        accuracies = 100 * np.array([column(c, "accuracy") for c in mine])
        left.plot(seconds, accuracies.mean(0), color=colour, label="LGPTrainer" if arm == "lgp" else label)
        left.fill_between(seconds, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.2, linewidth=0)
    seeds = len({c["seed"] for c in cells})
    left.set(xlabel="seconds of training", ylabel="test accuracy, %", title=f"mean and range over seeds (n = {seeds})")
    left.set(xlim=(0, None))
    logs = [c["log"] for c in by_seed(cells, shown).values()] if shown else []
    for name, label, colour in (
        ("lgp/fraction", "control fraction", "C2"),
        ("lgp/variance_explained", "share of variance explained", "C3"),
    ):
        readings: dict[float, list[float]] = {}
        for entry in (entry for log in logs for entry in log if name in entry):
            readings.setdefault(entry["step"], []).append(entry[name])
        if readings:
            steps = sorted(readings)
            right.plot(steps, [statistics.fmean(readings[step]) for step in steps], label=label, color=colour)
            low, high = ([end(readings[step]) for step in steps] for end in (min, max))
            right.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    right.set(xlabel="optimizer step", title=f"LGPTrainer ({shown})" if shown != "lgp" else "LGPTrainer")
    right.set(xlim=(0, None), ylim=(0, 1.02))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}", flush=True)
