"""The tables of README and docs, drawn from the result files: prints them, or writes them between the documents' markers.

Every number in the tables comes from a file under ``benchmarks/results``; a table whose file is missing is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy_summary import BASELINE, by_seed
from common import RESULTS
from hf_lgp.old_estimator import relative_variance

ROOT = Path(__file__).parents[1]
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
        return [label, *(f"{source['summary'][phase][key]:.3f}" for phase in phases)]

    return table(
        ["ρ²", *phases],
        [
            row("path and regression, mean over tensors", both, "rho2_layer_mean"),
            row("path alone (class token and mean rows)", both, "rho2_path_alone"),
            row("regression alone, as for models without a class token", alone, "rho2_layer_mean"),
            row("path and regression, weighted by gradient energy, which the embeddings dominate", both, "rho2_raw"),
        ],
    )


def wider() -> str | None:
    """The same for wider and deeper ViTs."""
    widths = {"192, ViT-tiny's": read("predictability_tiny"), "384, ViT-small's": read("predictability_384")}
    measured = {width: result for width, result in widths.items() if result is not None}
    if not measured:
        return None
    keys = {
        "mean over tensors": "rho2_layer_mean",
        "path alone": "rho2_path_alone",
        "weighted by gradient energy": "rho2_raw",
        "embeddings": "rho2 embeddings",
        "block 0": "rho2 block 0",
        "block 5": "rho2 block 5",
        "block 10": "rho2 block 10",
    }
    columns = [(f"width {width}, {phase}", s) for width, r in measured.items() for phase, s in r["summary"].items()]
    rows = [[label, *(f"{summary[key]:.3f}" for _, summary in columns)] for label, key in keys.items()]
    return table(["ρ² with 12 blocks, bf16", *(name for name, _ in columns)], rows)


def extra_variance() -> str | None:
    """Extra variance over the plain batch gradient."""
    result = read("extra_variance")
    if result is None:
        return None
    steps = result["steps"]
    rows = [
        ["median over tensors", *(f"{steps[s]['median']:.3f}" for s in steps)],
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
    for model in ("", "384_eager_", "197_", "ridge_", "cifar_", "eager_", "145_"):
        for cell in (read(f"step_cost_{model}cpu") or {"cells": []})["cells"]:
            regression = "path and regression" if cell["class_path"] else "regression alone"
            remark = regression if cell.get("regression", 1.0) > 0.5 else "path alone"
            prediction = cell["prediction_per_example"]
            attention = cell.get("attention", "sdpa")
            arm = f"{cell['vit']}, batch {cell['batch']}, {'bf16' if cell['bf16'] else 'fp32'}, {attention}, {remark}"
            fraction = f"{cell['fraction']:g}"
            numbers = [cell["step_ratio"], cell["control_ratio"], cell["forward_ratio"], cell["overhead_ratio"]]
            rows.append([arm, fraction, *(f"{n:.2f}" for n in numbers), f"{prediction:.2f}" if prediction else "n/a"])
    header = "a step, in exact steps of the whole batch"
    names = [
        header,
        "fraction",
        "whole",
        "control pass",
        "plain forward",
        "the rest",
        "one prediction, in exact examples",
    ]
    return table(names, rows) if rows else None


def price() -> str | None:
    """Price by phase, against each way to train plainly and as runs found it."""
    result = read("price")
    if result is None:
        return None
    rows = []
    for baseline in result["baselines"]:
        plain = f"{baseline['vit']}, {baseline['precision']}, {baseline['attention']} attention"
        for phase, kinds in baseline["phases"].items():
            cells = (f"{kind['price']:.2f} at {kind['best_fraction']:g}" for kind in kinds.values())
            rows.append([plain, phase, *cells])
    for logged in result["logged"]:
        name = Path(logged["source"]).stem
        runs = f"{TASKS.get(name, name)}: as {logged['seeds']} runs logged it"
        for step, entry in logged["steps"].items():
            single = entry["prices"]
            found = f"{entry['lgp_price']:.2f} at {entry['lgp_fraction']:g} ({min(single):.2f} to {max(single):.2f})"
            rows.append([runs, f"after step {step}", found, ""])
    header = "price (variance times cost, plain training is 1) at the best fraction"
    return table([header, "phase", "mean over tensors", "by energy"], rows)


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


def robustness() -> str | None:
    """Soak, kills and fuzz."""
    result = read("robustness")
    if result is None or "fuzz" not in result:
        return None
    soak, fuzz = result["soak"], result["fuzz"]
    rows = [
        ["soak: steps in one run", f"{soak['steps']:,}"],
        [
            "soak: resident memory, last fifth over the readings after the first tenth",
            f"{soak['memory_late_over_early']:.3f}",
        ],
        ["soak: processor time of a step, the same", f"{soak['step_time_late_over_early']:.3f}"],
    ]
    for kills in result["kills"]:
        many = "one process" if kills["processes"] == 1 else f"{kills['processes']} processes"
        rows += [
            [f"kills, {many}: runs killed until they were through", str(kills["runs"])],
            [
                f"kills, {many}: kills, of which while a checkpoint was being written",
                f"{kills['kills']}, {kills['kills_while_a_checkpoint_was_written']}",
            ],
            [
                f"kills, {many}: runs that ended bit for bit as one left alone",
                str(kills["runs_that_ended_bit_for_bit_equal"]),
            ],
        ]
    rows += [
        ["fuzz: runs under random valid settings of seven families", str(fuzz["runs"])],
        ["fuzz: micro-batches with predictions in them", f"{fuzz['micro_batches_with_predictions']:,}"],
        ["fuzz: failures", str(fuzz["failures"])],
    ]
    return table(["", "figure"], rows)


def seeds_of(figures: dict[str, Any]) -> str:
    """How many seeds an arm has."""
    count = len(figures["seeds"])
    return f"{count} seed{'s' * (count != 1)}"


def _ratio(figures: dict[str, Any]) -> str:
    """A median ratio with the single ones' range."""
    single = [value for value in figures["ratios"].values() if value is not None]
    missed = len(figures["ratios"]) - len(single)
    if figures["median_ratio"] is None:
        return f"not reached by {missed} of {len(figures['ratios'])}"
    spread = [f"{min(single):.2f} to {max(single):.2f}"] * (len(single) > 1) + [f"not reached by {missed}"] * (
        missed > 0
    )
    return f"{figures['median_ratio']:.2f}" + f" ({', '.join(spread)})" * bool(spread)


def time_to_accuracy() -> str | None:
    """Time to accuracy of LGPTrainer against Trainer, by task."""
    rows = []
    for name, task in TASKS.items():
        result = read(name)
        lgp = (result or {}).get("summary", {}).get("arms", {}).get("lgp")
        if lgp is None:
            continue
        wanted = [key for key in lgp["to_target"] if not key.startswith("mean")]
        plain = result["summary"]["arms"]["trainer"]["final_accuracy"]
        for arm, epochs in (
            ("lgp", "as many epochs"),
            ("longer", "1.1 times as many epochs"),
        ):
            figures = result["summary"]["arms"].get(arm)
            if figures is None:
                continue
            target, final = figures["to_target"][wanted[0]], figures["final_accuracy"]
            error = final["standard_error"]
            rows.append(
                [
                    f"{task}, {epochs}, {seeds_of(figures)}",
                    _ratio(figures["total_seconds"]),
                    f"{plain['mean']:.1%} ± {plain['standard_deviation']:.1%}",
                    f"{final['difference']:+.1%}" + (f" ± {error:.1%}" if error is not None else ""),
                    f"{wanted[0].removeprefix('accuracy of Trainer ')}: {_ratio(target)}",
                ]
            )
    header = [
        "task",
        "whole run, in Trainer's time",
        "Trainer's final accuracy",
        "LGPTrainer's, against it",
        "time to the accuracy that Trainer has",
    ]
    return table(header, rows) if rows else None


def arms() -> str | None:
    """All arms of all tasks, a table each."""
    return "\n\n".join(_arms(task, result) for name, task in TASKS.items() if (result := read(name))) or None


def _arms(task: str, result: dict[str, Any]) -> str:
    """All arms of one task."""
    rows = []
    for arm, figures in result["summary"]["arms"].items():
        target = figures["to_target"][result["summary"]["primary_target"]]
        rows.append(
            [
                ARMS.get(arm, arm),
                str(len(figures["seeds"])),
                _ratio(target),
                f"{figures['total_seconds']['median_ratio']:.2f}",
                f"{figures['final_accuracy']['mean']:.1%}",
                f"{figures['at_equal_time'][HALF_TIME]['difference']:+.1%}",
                f"{figures['peak_memory_mib']:,.0f}",
            ]
        )
    header = [f"arm, {task}", "seeds", f"time to {result['summary']['primary_target']}", "time of equally many epochs"]
    return table([*header, "final accuracy", "at half of Trainer's time, against it", "peak memory, MiB"], rows)


def equal_epochs() -> str | None:
    """What as many steps as Trainer's end with, against it; the last row takes both fine-tunings, each beside its own Trainer runs."""
    results = {task: result for name, task in TASKS.items() if (result := read(name))}
    rows = [_equal_epochs(task, [result]) for task, result in results.items()]
    finetunings = [task for task in results if task.startswith(FINETUNING)]
    if len(finetunings) > 1:
        rows.append(_equal_epochs(f"{FINETUNING}, both", [results[task] for task in finetunings]))
    header = [
        "`LGPTrainer` against `Trainer` at equal epochs",
        "seeds",
        "final accuracy",
        "standard deviation of Trainer's seeds",
    ]
    return table([*header, "test loss", "seeds with the higher loss"], rows) if rows else None


def _equal_epochs(task: str, results: list[dict[str, Any]]) -> list[str]:
    """Paired differences with their standard errors; deviations are of Trainer's seeds within a result."""
    accuracy, loss, variances = [], [], []
    for result in results:
        mine, plain = (by_seed(result["cells"], arm) for arm in ("lgp", BASELINE))
        loss += [mine[seed]["final"]["loss"] - plain[seed]["final"]["loss"] for seed in mine]
        of_lgp, of_trainer = (result["summary"]["arms"][arm]["final_accuracy"] for arm in ("lgp", BASELINE))
        accuracy += of_lgp["differences"]
        variances.append(of_trainer["standard_deviation"] ** 2)

    def error(values: list[float]) -> float:
        return statistics.stdev(values) / len(values) ** 0.5

    return [
        task,
        str(len(loss)),
        f"{statistics.fmean(accuracy):+.2%} ± {error(accuracy):.2%}",
        f"{statistics.fmean(variances) ** 0.5:.2%}",
        f"{statistics.fmean(loss):+.4f} ± {error(loss):.4f}",
        str(sum(value > 0 for value in loss)),
    ]


def ablations() -> str | None:
    """Price of a step at fraction 1/4 by what predicts."""
    result = read("time_to_accuracy_ablations")
    if result is None:
        return None
    cells = {cell["arm"]: cell for cell in result["cells"]}

    def pace(arm: str) -> float:
        """Seconds of a step in the second half of the run, when the predictor has long been ready."""
        middle, last = cells[arm]["curve"][len(cells[arm]["curve"]) // 2], cells[arm]["curve"][-1]
        return (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])

    rows = []
    for arm in cells:
        if arm == "trainer":
            continue
        entries = [entry for entry in cells[arm]["log"] if "lgp_rho2" in entry]
        second_half = [entry["lgp_rho2"] for entry in entries[len(entries) // 2 :]]
        fraction, rho2, cost = entries[-1]["lgp_fraction"], statistics.fmean(second_half), pace(arm) / pace("trainer")
        variance = relative_variance(fraction, rho2)
        rows.append([ARMS[arm], f"{rho2:.2f}", f"{variance:.2f}", f"{cost:.2f}", f"{cost * variance:.2f}"])
    header = [
        "what predicts, with a quarter of every batch exact",
        "ρ², mean over tensors",
        "variance",
        "cost of a step",
    ]
    return table([*header, "price"], rows)


def no_gain() -> str | None:
    """What LGPTrainer costs where it cannot win."""
    rows = []
    for name, task in NO_GAIN.items():
        result = read(name)
        if result is None:
            continue
        figures, plain = (result["summary"]["arms"][arm] for arm in ("lgp", "trainer"))
        final = figures["final_accuracy"]
        rows.append(
            [
                f"{task}, {len(figures['seeds'])} seeds",
                _ratio(figures["total_seconds"]),
                f"{plain['final_accuracy']['mean']:.1%}",
                f"{final['difference']:+.1%} ± {final['standard_error']:.1%}",
            ]
        )
    header = [
        "where nothing can be gained",
        "whole run against Trainer",
        "Trainer's accuracy",
        "LGPTrainer's, against it",
    ]
    return table(header, rows) if rows else None


FINETUNING = "fine-tuning on five new classes"

TASKS = {
    "time_to_accuracy_scratch_fp32": "CIFAR-10 from scratch, fp32",
    "time_to_accuracy_scratch": "CIFAR-10 from scratch, bf16, variance budget 1.1",
    "time_to_accuracy_finetune_fp32": f"{FINETUNING}, fp32",
    "time_to_accuracy_finetune": f"{FINETUNING}, bf16",
}

ARMS = {
    "trainer": "`Trainer`",
    "lgp": "`LGPTrainer`, automatic",
    "longer": "the same, with 1.1 times as many epochs",
    "early": "automatic, predictions from the start",
    "f=0.5": "half exact",
    "f=0.25": "a quarter exact",
    "f=0.125": "an eighth exact",
    "path-alone": "a quarter exact, path alone",
    "ridge-alone": "a quarter exact, regression alone",
    "label-only": "a quarter exact, regression on residuals alone",
    "constant": "a quarter exact, constant predictor",
}

NO_GAIN = {"no_gain_random_labels": "random labels", "no_gain_tiny": "a ViT of two blocks of width 32 on digits"}

HALF_TIME = "50% of Trainer's time"


TABLES: dict[str, list[Callable[[], str | None]]] = {
    "README.md": [time_to_accuracy, no_gain],
    "docs/measurements.md": [
        arms,
        equal_epochs,
        ablations,
        predictability,
        wider,
        extra_variance,
        step_cost,
        price,
        worth,
    ],
    "docs/robustness.md": [robustness],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into the documents")
    options = parser.parse_args()
    for name, tables in TABLES.items():
        text = "\n\n".join(drawn for make in tables if (drawn := make()) is not None)
        if not options.write:
            print(text)
            continue
        document = ROOT / name
        before, rest = document.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        document.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
