"""The README's tables, drawn from the result files: prints them, or writes them between the README's markers.

Every number in the tables comes from a file under ``benchmarks/results``; a table whose file is missing is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- tables: benchmarks/tables.py --write -->", "<!-- end of tables -->"


def read(name: str) -> Any:
    """A result file, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def predictability() -> str | None:
    """Shares of variance explained, by phase."""
    both, alone = read("predictability"), read("predictability_ridge")
    if both is None or alone is None:
        return None
    phases = list(both["summary"])

    def row(label: str, source: Any, key: str) -> list[str]:
        return [label, *(f"{source['summary'][phase][key]:.2f}" for phase in phases)]

    return table(
        ["ρ²", *phases],
        [
            row("path and regression, mean over tensors", both, "rho2_layer_mean"),
            row("path alone (class token and mean row)", both, "rho2_path_alone"),
            row("regression alone, as for models without a class token", alone, "rho2_layer_mean"),
            row("path and regression, weighted by gradient energy, which the embeddings dominate", both, "rho2_raw"),
        ],
    )


def extra_variance() -> str | None:
    """Extra variance over the plain batch gradient."""
    result = read("extra_variance")
    if result is None:
        return None
    steps = result["steps"]
    rows = [
        ["median over tensors", *(f"{steps[s]['median']:.2f}" for s in steps)],
        ["worst tensor", *(f"{steps[s]['worst']:.2f}" for s in steps)],
        ["whole gradient", *(f"{steps[s]['whole_gradient']:.2f}" for s in steps)],
    ]
    if all("in_adam_units" in measured for measured in steps.values()):
        rows.append(["entries scaled as Adam does", *(f"{steps[s]['in_adam_units']:.2f}" for s in steps)])
    header = "extra variance over the exact gradient of the batch (0 is exact, 3 is no prediction)"
    return table([header, *(f"step {int(s):,}" for s in steps)], rows)


def step_cost() -> str | None:
    """Cost of a step in exact steps."""
    rows = []
    for name, remark in (
        ("step_cost_cpu", "path and regression"),
        ("step_cost_ridge_cpu", "regression alone"),
        ("step_cost_cifar_cpu", "path and regression"),
    ):
        for cell in (read(name) or {"cells": []})["cells"]:
            prediction = cell["prediction_per_example"]
            model = f"{cell['vit']}, batch {cell['batch']}, {'bf16' if cell['bf16'] else 'fp32'}, {remark}"
            numbers = [cell["step_ratio"], cell["control_ratio"], cell["forward_ratio"], cell["overhead_ratio"]]
            rows.append([model, *(f"{n:.2f}" for n in numbers), f"{prediction:.2f}" if prediction else "n/a"])
    header = "a step at fraction 1/4, in exact steps of the whole batch"
    names = [header, "whole", "control pass", "plain forward", "the rest", "one prediction, in exact examples"]
    return table(names, rows) if rows else None


def price() -> str | None:
    """Price by phase."""
    result = read("price")
    if result is None:
        return None
    rows = []
    for phase, kinds in result["phases"].items():
        cells = (f"{kind['price']:.2f} at {kind['best_fraction']:g}" for kind in kinds.values())
        rows.append([phase, *cells])
    return table(
        ["price (variance times cost, plain training is 1) at the best fraction", "mean over tensors", "by energy"],
        rows,
    )


def worth() -> str | None:
    """Test loss step for step."""
    result = read("worth")
    if result is None:
        return None
    cells = result["cells"]
    kinds = sorted(dict.fromkeys((c["batch"], c["fraction"]) for c in cells), key=lambda kind: (kind[1], -kind[0]))
    rows = []
    for batch, fraction in kinds:
        mine = [c for c in cells if (c["batch"], c["fraction"]) == (batch, fraction)]
        label = f"Trainer, batch {batch}" if fraction == 1.0 else f"LGPTrainer, batch {batch}, fraction {fraction:g}"
        losses = [[c["test"][step]["loss"] for c in mine] for step in mine[0]["test"]]
        rows.append([f"{label} ({len(mine)} seed{'s' * (len(mine) > 1)})", *(_with_error(values) for values in losses)])
    return table(["test loss after step", *cells[0]["test"]], rows)


def _with_error(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else f"{mean:.3f}"


TABLES: list[Callable[[], str | None]] = [predictability, extra_variance, step_cost, price, worth]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into the README")
    options = parser.parse_args()
    text = "\n\n".join(drawn for make in TABLES if (drawn := make()) is not None)
    if not options.write:
        print(text)
        return
    before, rest = README.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    README.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
