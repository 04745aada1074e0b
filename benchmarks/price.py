"""Statistical price of a step by phase of training, from measured correlations and measured times.

Reads the result files of ``predictability.py`` and ``step_cost.py`` for the same models and writes, for each model, each phase, each way to train
plainly that was timed and the control fractions to choose from, the price ``E = variance * cost`` of formula (2) with the *measured* cost of a step; at fractions that were
not timed, control and prediction examples at their measured times plus the measured rest of a step. Plain training has price 1. ``mean over tensors`` weighs
tensors equally, which is closer to what Adam sees; ``by gradient energy`` weighs them by variance.

Beside these stand the prices that whole runs of ``time_to_accuracy.py`` found by themselves, medians over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS, write_json
from hf_lgp.old_estimator import relative_variance
from hf_lgp.plans import FRACTIONS

LOGGED = ("lgp_price", "lgp_cost", "lgp_fraction", "lgp_rho2_weighted", "lgp_rho2_worst")


def costs(cells: list[dict[str, Any]]) -> dict[float, float]:
    """Cost of a step at each fraction in exact steps: measured where a cell has it, else put together from the first cell's parts."""
    first = cells[0]
    own = first["fraction"]
    control, prediction = first["control_ratio"] / own, first["prediction_per_example"]
    rest = first["step_ratio"] - own * control - (1.0 - own) * prediction
    estimated = {f: f * control + (1.0 - f) * prediction + rest for f in FRACTIONS}
    return {**estimated, **{cell["fraction"]: cell["step_ratio"] for cell in cells}}


def prices(summary: dict[str, Any], cost: dict[float, float], regression: bool) -> dict[str, Any]:
    """Prices of one phase, of steps with the regression or without; the energies are those with it."""
    table: dict[str, Any] = {}
    of_tensors = "rho2_layer_mean" if regression else "rho2_path_alone"
    for name, key in (("mean over tensors", of_tensors), ("by gradient energy", "rho2_raw")):
        by_fraction = {str(f): round(relative_variance(f, summary[key]) * c, 4) for f, c in cost.items()}
        best = min(by_fraction, key=lambda f: by_fraction[f])
        table[name] = {
            "rho2": round(summary[key], 4),
            "best_fraction": float(best),
            "price": by_fraction[best],
            "price_by_fraction": by_fraction,
        }
    return table


def of_baseline(measured: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Prices against one way to train plainly; None if the file is of another model."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["vit"] == measured["settings"]["vit"] and cell["class_path"]]
    if not cells:
        return None
    cost, first = costs(cells), cells[0]
    regression = any(cell.get("regression", 1.0) > 0.5 for cell in cells)
    return {
        "vit": first["vit"],
        "source": path.name,
        "precision": "bf16" if first["bf16"] else "fp32",
        "attention": first["attention"],
        "exact_step_seconds": round(first["median_seconds"]["exact"], 4),
        "cost_by_fraction": {str(f): round(c, 4) for f, c in cost.items()},
        "measured_fractions": [cell["fraction"] for cell in cells],
        "regression": regression,
        "phases": {phase: prices(summary, cost, regression) for phase, summary in measured["summary"].items()},
    }


def logged(path: Path, steps: list[int]) -> dict[str, Any]:
    """What the automatic mode logged next after those of the given steps that the runs reached, medians over the seeds of arm ``lgp``."""
    result = json.loads(path.read_text(encoding="utf-8"))
    runs = [cell["log"] for cell in result["cells"] if cell["arm"] == "lgp"]
    table = {}
    for step in (step for step in steps if all(run[-1]["step"] >= step for run in runs)):
        entries = [next(entry for entry in run if entry["step"] >= step) for run in runs]
        table[str(step)] = {
            **{key: round(statistics.median(entry[key] for entry in entries), 4) for key in LOGGED},
            "prices": [entry["lgp_price"] for entry in entries],
        }
    return {"source": path.name, "seeds": len(runs), "steps": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shares_by_default = [RESULTS / "predictability.json", RESULTS / "predictability_384.json"]
    parser.add_argument("--predictability", type=Path, nargs="+", default=shares_by_default)
    costs_by_default = [RESULTS / f"step_cost_{name}cpu.json" for name in ("", "384_eager_", "cifar_", "eager_")]
    parser.add_argument("--step-cost", type=Path, nargs="+", default=costs_by_default)
    names = ("scratch_fp32", "scratch", "finetune_fp32", "finetune")
    runs_by_default = [RESULTS / f"time_to_accuracy_{name}.json" for name in names]
    parser.add_argument("--runs", type=Path, nargs="+", default=runs_by_default)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 300, 400, 490])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = (json.loads(path.read_text(encoding="utf-8")) for path in options.predictability)
    found = [of_baseline(shares, path) for shares in measured for path in options.step_cost]
    result = {
        "predictability": [path.name for path in options.predictability],
        "baselines": [baseline for baseline in found if baseline is not None],
        "logged": [logged(path, options.steps) for path in options.runs],
    }
    write_json(options.output / "price.json", result)
    for baseline in result["baselines"]:
        for phase, kinds in baseline["phases"].items():
            for name, row in kinds.items():
                print(
                    f"{baseline['vit']} {baseline['precision']} {baseline['attention']}, {phase}, {name}: rho2 {row['rho2']}, "
                    f"price {row['price']} at {row['best_fraction']}",
                    flush=True,
                )
    for runs in result["logged"]:
        for step, row in runs["steps"].items():
            print(f"{runs['source']}, logged after step {step}: {row}", flush=True)


if __name__ == "__main__":
    main()
