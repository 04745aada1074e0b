"""Statistical price of a step by phase of training, from measured correlations and measured times.

Reads the result files of ``predictability.py`` and ``step_cost.py`` for the same model and hardware and writes, for each phase
and a few control fractions, the price ``E = variance * cost`` of formula (2) with the *measured* cost of a step; at fractions that were
not timed, control and prediction examples at their measured times plus the measured rest of a step. Plain training has price 1. ``mean over tensors`` weighs
tensors equally, which is closer to what Adam sees; ``by gradient energy`` weighs them by variance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, write_json

from hf_lgp.estimator import relative_variance

FRACTIONS = (0.5, 0.25, 0.125, 0.0625)


def costs(cells: list[dict[str, Any]]) -> dict[float, float]:
    """Cost of a step at each fraction in exact steps: measured where a cell has it, else put together from the first cell's parts."""
    first = cells[0]
    own = first["fraction"]
    control, prediction = first["control_ratio"] / own, first["prediction_per_example"]
    rest = first["step_ratio"] - own * control - (1.0 - own) * prediction
    estimated = {f: f * control + (1.0 - f) * prediction + rest for f in FRACTIONS}
    return {**estimated, **{cell["fraction"]: cell["step_ratio"] for cell in cells}}


def prices(summary: dict[str, Any], cost: dict[float, float]) -> dict[str, Any]:
    """Prices of one phase."""
    table: dict[str, Any] = {}
    for name, key in (("mean over tensors", "rho2_layer_mean"), ("by gradient energy", "rho2_raw")):
        by_fraction = {str(f): round(relative_variance(f, summary[key]) * c, 4) for f, c in cost.items()}
        best = min(by_fraction, key=lambda f: by_fraction[f])
        table[name] = {
            "rho2": round(summary[key], 4),
            "best_fraction": float(best),
            "price": by_fraction[best],
            "price_by_fraction": by_fraction,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predictability", type=Path, default=RESULTS / "predictability.json")
    parser.add_argument("--step-cost", type=Path, default=RESULTS / "step_cost_cifar_cpu.json")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured, cells = json.loads(options.predictability.read_text()), json.loads(options.step_cost.read_text())["cells"]
    cells = [cell for cell in cells if cell["vit"] == measured["settings"]["vit"] and cell["class_path"]]
    cost = costs(cells)
    result = {
        "sources": [options.predictability.name, options.step_cost.name],
        "cost_by_fraction": {str(f): round(c, 4) for f, c in cost.items()},
        "measured_fractions": [cell["fraction"] for cell in cells],
        "phases": {phase: prices(summary, cost) for phase, summary in measured["summary"].items()},
    }
    write_json(options.output / "price.json", result)
    for phase, table in result["phases"].items():
        for name, row in table.items():
            print(f"{phase}, {name}: rho2 {row['rho2']}, price {row['price']} at {row['best_fraction']}", flush=True)
            print("   ", row["price_by_fraction"], flush=True)


if __name__ == "__main__":
    main()
