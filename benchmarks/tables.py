"""The tables of README and docs, drawn from the result files: prints them, or writes them between the documents' markers.

Every number in the tables comes from a file under ``benchmarks/results``, and its label from the file's settings; a table without a file is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accuracy_arms import NAMES
from accuracy_summary import BASELINE, by_seed
from common import RESULTS
from scipy.stats import ttest_rel

ROOT = Path(__file__).parents[1]
START, END = "<!-- tables: benchmarks/tables.py --write -->", "<!-- end of tables -->"

TASKS = {
    "scratch": "CIFAR-10 from scratch",
    "finetune": "fine-tuning on five new classes",
    "random-labels": "random labels",
    "tiny": "a ViT of two blocks of width 32 on digits",
}

IDEAS = {
    "first-row": "predictions, beside the last block on one row",
    "late": "predicting from the eighth micro-batch on",
    "quarter": "smaller fractions than a quarter",
    "eighth": "choosing the fraction",
    "sixteenth": "choosing the fraction",
    "budget-1.25": "the variance budget of 1.1",
    "means-only": "rows followed by themselves",
}
"""What arms do without, by name."""

PAYS = 0.97
"""A price below is one at which predictions pay."""

TEXTS = {"reviews": "sentences of film reviews", "r8": "Reuters news"}

OF_TRAINER = "accuracy of Trainer "

HALF_TIME = "50% of Trainer's time"


def results(pattern: str) -> Iterator[dict[str, Any]]:
    """The result files of one kind, in the order of their names; those of smoke runs are none."""
    for path in sorted(RESULTS.glob(f"{pattern}.json")):
        if "_smoke" not in path.stem:
            yield json.loads(path.read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str | None:
    """A Markdown table; None without rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else None


def runs_with(pattern: str, *arms: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the tasks, and results, of comparisons that have these arms."""
    for result in results(pattern):
        if all(arm in result["summary"]["arms"] for arm in arms):
            s = result["settings"]
            images = f"{s['images']:,} images" if s["images"] else ""
            precision = "bf16" if s["bf16"] else "fp32"
            told = (TASKS[s["task"]], images, f"{s['epochs']:g} epochs", precision, s["vit"])
            yield ", ".join(part for part in told if part), result


def seeds_of(figures: dict[str, Any]) -> str:
    """How many seeds an arm has."""
    count = len(figures["seeds"])
    return f"{count} seed{'s' * (count != 1)}"


def ratio(figures: dict[str, Any]) -> str:
    """A median ratio with the single ones' range."""
    single = [value for value in figures["ratios"].values() if value is not None]
    missed = len(figures["ratios"]) - len(single)
    if figures["median_ratio"] is None:
        return f"not reached by {missed} of {len(figures['ratios'])}"
    remarks = [f"{min(single):.2f} to {max(single):.2f}"] * (len(single) > 1)
    remarks += [f"not reached by {missed}"] * (missed > 0)
    return f"{figures['median_ratio']:.2f}" + f" ({', '.join(remarks)})" * bool(remarks)


def with_error(value: float, error: float | None, form: str) -> str:
    """A number with its error, where there is one."""
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def points(value: float, error: float | None = None, digits: int = 1) -> str:
    """A difference of accuracies, in points, with its error, where there is one."""
    return with_error(100 * value, None if error is None else 100 * error, f"+.{digits}f") + " points"


def standard_error(values: list[float]) -> float | None:
    """Of a mean; None of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def headline() -> str | None:
    """The result in a sentence or two."""
    others = ""
    runs = (runs_with(f"time_to_accuracy_{name}", "lgp", BASELINE) for name in ("finetune_fp32", "*_bf16"))
    for task, result in itertools.chain(*runs):
        figures = result["summary"]["arms"]["lgp"]
        final = figures["final_accuracy"]
        others += (
            f" {task[0].upper()}{task[1:]}, {seeds_of(figures)}: {figures['total_seconds']['median_ratio']:.2f} of `Trainer`'s time, "
            f"accuracy {points(final['difference'], final['standard_error'])}."
        )
    for task, result in runs_with("time_to_accuracy_scratch_fp32", "lgp", BASELINE):
        figures = result["summary"]["arms"]["lgp"]
        final, machine = figures["final_accuracy"], result["environment"]
        return (
            f"**{1.0 / figures['total_seconds']['median_ratio']:.1f} times faster at equal epochs, accuracy "
            f"{points(final['difference'], final['standard_error'])} (one standard error)**: {task}, {seeds_of(figures)}, on "
            f"{machine['device']} with {machine['threads']} threads.{others}"
        )
    return None


def time_to_accuracy() -> str | None:
    """Time to accuracy of LGPTrainer against Trainer, by task."""
    rows = []
    for task, result in runs_with("time_to_accuracy_*", "lgp", BASELINE):
        arms = result["summary"]["arms"]
        plain, figures, final = arms[BASELINE]["final_accuracy"], arms["lgp"], arms["lgp"]["final_accuracy"]
        targets = result["summary"]["primary_target"], f"{OF_TRAINER}at the end"
        rows.append(
            [
                f"{task}, {seeds_of(figures)}",
                f"{statistics.median(cell['seconds'] for cell in by_seed(result['cells'], BASELINE).values()):.0f}",
                ratio(figures["total_seconds"]),
                with_error(plain["mean"], plain["standard_deviation"], ".1%"),
                points(final["difference"], final["standard_error"]),
                *(f"{name.removeprefix(OF_TRAINER)}: {ratio(figures['to_target'][name])}" for name in targets),
            ]
        )
    header = [
        "task",
        "`Trainer`'s run, seconds",
        "whole run, in that",
        "Trainer's final accuracy",
        "accuracy against it",
    ]
    return table([*header, "time to the accuracy that Trainer has", "time to that it ends with"], rows)


def no_gain() -> str | None:
    """What LGPTrainer costs where it cannot win."""
    rows = []
    for task, result in runs_with("no_gain_*", "lgp", BASELINE):
        figures, plain = (result["summary"]["arms"][arm] for arm in ("lgp", BASELINE))
        final = figures["final_accuracy"]
        rows.append(
            [
                f"{task}, {seeds_of(figures)}",
                ratio(figures["total_seconds"]),
                f"{plain['final_accuracy']['mean']:.1%}",
                points(final["difference"], final["standard_error"]),
            ]
        )
    header = ["where little was to be expected", "whole run against Trainer", "Trainer's accuracy"]
    return table([*header, "LGPTrainer's, against it"], rows)


def arms() -> str | None:
    """All arms of all tasks, a table each."""
    return "\n\n".join(_arms(*run) for run in runs_with("time_to_accuracy_*", BASELINE)) or None


def _arms(task: str, result: dict[str, Any]) -> str:
    """All arms of one task."""
    rows = []
    for arm, figures in result["summary"]["arms"].items():
        taken = [cell["micro_batches"] for cell in result["cells"] if cell["arm"] == arm and cell["micro_batches"]]
        shares = [steps["predicted"] / max(1, sum(steps.values())) for steps in taken]
        own, plain = by_seed(result["cells"], arm), by_seed(result["cells"], BASELINE)
        loss = [own[s]["final"]["loss"] - plain[s]["final"]["loss"] for s in own if s in plain]
        final = figures["final_accuracy"]
        rows.append(
            [
                NAMES.get(arm, arm),
                str(len(figures["seeds"])),
                f"{statistics.fmean(shares):.0%}" if shares else "none",
                ratio(figures["to_target"][result["summary"]["primary_target"]]),
                ratio(figures["total_seconds"]),
                f"{final['mean']:.1%}" if arm == BASELINE else points(final["difference"], final["standard_error"]),
                with_error(statistics.fmean(loss), standard_error(loss), "+.3f"),
                points(figures["at_equal_time"][HALF_TIME]["difference"]),
                f"{figures['peak_memory_mib']:,.0f}",
            ]
        )
    header = [f"arm, {task}", "seeds", "steps with predictions", f"time to {result['summary']['primary_target']}"]
    header += [
        "time of the whole run",
        "final accuracy, against `Trainer`'s",
        "test loss against it",
        "at half of Trainer's time, against it",
        "peak memory, MiB",
    ]
    return table(header, rows) or ""


def equal_epochs() -> str | None:
    """What as many steps as Trainer's end with, against it."""
    rows = []
    for task, result in runs_with("time_to_accuracy_*", "lgp", BASELINE):
        mine, plain = (by_seed(result["cells"], arm) for arm in ("lgp", BASELINE))
        loss = [mine[s]["final"]["loss"] - plain[s]["final"]["loss"] for s in mine if s in plain]
        accuracy = result["summary"]["arms"]["lgp"]["final_accuracy"]
        spread = result["summary"]["arms"][BASELINE]["final_accuracy"]["standard_deviation"]
        rows.append(
            [
                task,
                str(len(loss)),
                points(accuracy["difference"], accuracy["standard_error"], 2),
                "n/a" if spread is None else f"{spread:.2%}",
                with_error(statistics.fmean(loss), standard_error(loss), "+.4f"),
                str(sum(value > 0 for value in loss)),
            ]
        )
    header = ["`LGPTrainer` against `Trainer` at equal epochs", "seeds", "final accuracy"]
    return table([*header, "standard deviation of Trainer's seeds", "test loss", "seeds with the higher loss"], rows)


def baselines(pattern: str = "time_to_accuracy_*") -> str | None:
    """What else could be done with the time that LGPTrainer takes, a table for each task."""
    return "\n\n".join(_baselines(*run) for run in runs_with(pattern, "lgp", BASELINE, "compressed")) or None


def _baselines(task: str, result: dict[str, Any]) -> str:
    """LGPTrainer against each of the others, seed by seed."""
    rows, arms, final = [], result["summary"]["arms"], {}
    for arm in (
        name
        for name in (BASELINE, "first-row", "compressed", "small-batch", "infobatch", "longer", "faster", "lgp")
        if name in arms
    ):
        final[arm] = {seed: cell["final"]["accuracy"] for seed, cell in by_seed(result["cells"], arm).items()}
    for arm, accuracy in final.items():
        seeds = [seed for seed in final["lgp"] if seed in accuracy]
        told = ["", ""]
        if arm != "lgp" and len(seeds) > 1:
            test = ttest_rel(*([of[seed] for seed in seeds] for of in (final["lgp"], accuracy)))
            low, high = test.confidence_interval(0.95)
            mean = statistics.fmean(final["lgp"][seed] - accuracy[seed] for seed in seeds)
            told = [f"{points(mean)} ({100 * low:+.1f} to {100 * high:+.1f})", f"{test.pvalue:.2g}"]
        mean_accuracy = f"{statistics.fmean(accuracy[seed] for seed in seeds):.1%}"
        few = f", {len(seeds)} of the seeds" * (len(seeds) < len(final["lgp"]))
        rows.append([NAMES[arm] + few, ratio(arms[arm]["total_seconds"]), mean_accuracy, *told])
    header = [f"{task}, {seeds_of(arms['lgp'])}", "time, in Trainer's", "final accuracy"]
    return table([*header, "`LGPTrainer` minus this row (95%)", "p, paired t-test"], rows) or ""


def ablation() -> str | None:
    """What each idea brings: automatic runs without it, against those with all of them, seed by seed."""
    rows = []
    for task, result in (*runs_with("time_to_accuracy_*", "lgp"), *runs_with("ablation_*")):
        whole = by_seed(result["cells"], "lgp")
        for arm, idea in IDEAS.items():
            without = by_seed(result["cells"], arm)
            seeds = [seed for seed in whole if seed in without]
            if not seeds:
                continue
            times = [without[seed]["seconds"] / whole[seed]["seconds"] for seed in seeds]
            off = [without[seed]["final"]["accuracy"] - whole[seed]["final"]["accuracy"] for seed in seeds]
            loss = [without[seed]["final"]["loss"] - whole[seed]["final"]["loss"] for seed in seeds]
            rows.append(
                [
                    f"{task}: {idea}",
                    NAMES[arm],
                    str(len(seeds)),
                    f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
                    points(statistics.fmean(off), standard_error(off)),
                    with_error(statistics.fmean(loss), standard_error(loss), "+.3f"),
                ]
            )
    header = ["what an idea brings", "without it", "seeds", "time, in that of `LGPTrainer`, automatic"]
    return table([*header, "final accuracy, against it", "test loss, against it"], rows)


def noise() -> str | None:
    """What noise alone costs: against Trainer, seed by seed, predicted steps and exact ones with as much noise."""
    rows = []
    for task, result in runs_with("noise_*", BASELINE, "noise"):
        plain = by_seed(result["cells"], BASELINE)
        for arm in (name for name in result["summary"]["arms"] if name != BASELINE):
            own = by_seed(result["cells"], arm)
            pairs = [(cell["final"], plain[seed]["final"]) for seed, cell in own.items() if seed in plain]
            off, loss = ([mine[n] - theirs[n] for mine, theirs in pairs] for n in ("accuracy", "loss"))
            row = [f"{task}: {NAMES[arm]}", str(len(pairs))]
            row += [points(statistics.fmean(off), standard_error(off), 2)]
            rows.append([*row, with_error(statistics.fmean(loss), standard_error(loss), "+.4f")])
    header = [
        "what noise costs, at equal epochs",
        "seeds",
        "final accuracy against `Trainer`'s",
        "test loss against it",
    ]
    return table(header, rows)


def predictability() -> str | None:
    """Shares of variance explained, by steps of training and number of groups."""
    rows = []
    for result in results("predictability*"):
        for step, measured in result["steps"].items():
            for name in (name for name in measured if name.startswith("K = ")):
                of = measured[name]
                share, parts = of["explained"], of["explained"]["by_part"]
                numbers = [share["mean"], share["weighted"], share["worst"]]
                numbers += [parts["embeddings"], parts["block 0"], of["squared_correlation"]["weighted"]]
                numbers.append(of["share_of_worst_example"])
                row = [f"{result['settings']['vit']}, step {int(step):,}", name, *(f"{n:.3f}" for n in numbers)]
                rows.append([*row, f"`{share['worst_tensor']}`"])
    header = ["variance of single examples' gradients that is explained", "rows", "mean over tensors"]
    header += ["weighted by variance", "worst tensor", "embeddings", "first block"]
    return table([*header, "squared correlation, weighted", "residual of one example", "the worst tensor"], rows)


def step_cost() -> str | None:
    """Cost of every kind of step in exact steps."""
    rows = []
    for result in results("step_cost_*"):
        precision = "bf16" if result["bf16"] else "fp32"
        how = f"{precision}, {result['attention']}{', compiled' * bool(result['compiled'])}"
        label = f"{result['vit']}, {result['rows']} rows, batch {result['batch']}, {how}"
        for kind, figures in result["steps"].items():
            names = ("cost", "against_own_exact", "control", "others", "walk_and_rest", "kappa_against_own_exact")
            rows.append([label, kind, *(f"{figures[name]:.2f}" if name in figures else "" for name in names)])
    header = ["model", "step", "in exact steps of `Trainer`", "in exact steps of `LGPTrainer`", "control examples"]
    return table([*header, "forward of the others", "walk and the rest", "one prediction, in exact examples"], rows)


def versions() -> str | None:
    """A step of this version against one of the version before."""
    rows = []
    for result in results("versions_*"):
        s = result["settings"]
        for arm, figures in result["summary"].items():
            told = {"old": f"version before, f = {s['fraction']:g}", "new": f"this version, f = {s['fraction']:g}"}
            told["new / old"] = told["new"]
            single = f"{min(figures['ratios']):.2f} to {max(figures['ratios']):.2f}"
            against = "of the version before" if arm == "new / old" else "of `Trainer`"
            label = told.get(arm, arm.replace("new, 1/8", "new, f = 0.125").replace("new", "this version"))
            rows.append([f"{s['vit']}, batch {s['batch']}", label, f"{figures['median']:.2f} {against}", single])
    return table(["whole steps of `LGPTrainer`, measuring included", "step", "time", "single repeats"], rows)


def paper_cost() -> str | None:
    """A step on GPUs that were not at hand."""
    rows = []
    for result in results("paper_cost_*"):
        s = result["settings"]
        for gpu, batches in result["gpus"].items():
            for way in ("eager", "compiled"):
                ratios = [f"{batch}: {figures[way]['lgp']:.2f}" for batch, figures in batches.items()]
                rows.append([s["vit"], f"{gpu}, {result['assumed'][gpu]['dtype']}", way, ", ".join(ratios)])
    return table(
        ["on paper, not measured", "GPU", "both steps", "step at f = 0.25 against `Trainer`'s, by batch size"], rows
    )


def paper_launches() -> str | None:
    """Kernel launches and memory of these steps."""
    rows = []
    for result in results("paper_cost_*"):
        n = result["launches"]
        memory = {batch: figures["peak_memory"] for batch, figures in next(iter(result["gpus"].values())).items()}
        told = ", ".join(f"{batch}: {ratio:.2f}" for batch, ratio in memory.items())
        rows.append([result["settings"]["vit"], *(f"{n[k]:,}" for k in ("exact", "predicted", "measuring")), told])
    header = [
        "on paper",
        "launches of an exact step",
        "predicted",
        "measuring",
        "peak memory against `Trainer`'s, by batch size",
    ]
    return table(header, rows)


def coverage() -> str | None:
    """How many architectures pass the check."""
    rows = [row for result in results("architectures*") for row in result["rows"].values()]
    passed = [row for row in rows if "exact_because" not in row]
    if not rows:
        return None
    told = [
        f"{figures['time_ratio']:.2f} of `Trainer`'s time on {TEXTS[task]} (accuracy {points(figures['accuracy_difference'])}, "
        f"{100 * figures['accuracy_difference_95'][0]:+.1f} to {100 * figures['accuracy_difference_95'][1]:+.1f} at 95%)"
        for result in results("finetune_text*")
        for task, figures in result["summary"].items()
    ]
    texts = (
        f" On short texts predictions do not pay, and `LGPTrainer` trains exactly; as its last block runs on one row, fine-tuning a small BERT "
        f"still takes {' and '.join(told)}."
        if told
        else ""
    )
    return (
        f"Of {len(rows)} model types and variants that were tried, {len(passed)} pass the check; the others train exactly and say why: "
        f"[the table](docs/compatibility.md#models).{texts}"
    )


def architectures() -> str | None:
    """Every architecture that was tried: how well it is predicted, or why it is not."""
    rows = []
    for result in results("architectures*"):
        for name, row in sorted(result["rows"].items()):
            kind, model = name.split(": ", 1)
            if "exact_because" in row:
                rows.append([kind, f"`{model}`", "", "", "", "", f"exact: {row['exact_because'][:160]}"])
                continue
            few, many = (
                f"{row['explained'][k]['mean']:.2f} / {row['explained'][k]['weighted']:.2f}" for k in ("0", "2")
            )
            doublings, fraction = row["at"].split(", ")
            followed = "" if fraction == "1" else f", {1 + (4 << int(doublings))} rows"
            own = "last block on one row, " if row["first_row"] and fraction == "1" else ""
            pays = "predicted" if fraction != "1" and row["price"] < PAYS else f"exact, {own}predictions do not pay"
            rows.append(
                [
                    kind,
                    f"`{model}`",
                    few,
                    many,
                    f"{row['price']:.2f} at {fraction}{followed}",
                    "" if row["bias"] is None else f"{row['bias']:.0e}",
                    pays,
                ]
            )
    header = ["reads", "model type", "explained by 5 rows: mean over tensors / weighted", "by 17 rows"]
    return table([*header, "least price, and its fraction and rows", "bias over all draws", "at this size"], rows)


def seeds_of_architectures() -> str | None:
    """How much single rows of that table scatter from seed to seed."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in results("seeds_of_architectures"):
        for name, row in sorted(result["rows"].items()):
            if "explained" in row:
                by_model.setdefault(name.split(": ", 1)[1].split(", seed")[0], []).append(row["explained"]["2"])
    rows = [
        [f"`{model}`", str(len(each)), *(", ".join(f"{e[name]:.2f}" for e in each) for name in ("mean", "weighted"))]
        for model, each in by_model.items()
    ]
    return table(["model type", "seeds", "explained by 17 rows: mean over tensors", "weighted"], rows)


def finetune_text() -> str | None:
    """A pretrained BERT fine-tuned on texts."""
    rows = []
    for result in results("finetune_text*"):
        for task, figures in result["summary"].items():
            time, off = figures["time_ratio_95"], figures["accuracy_difference_95"]
            accuracies = (f"{figures[f'accuracy_{arm}']:.1%}" for arm in ("trainer", "lgp"))
            difference = (
                f"{100 * figures['accuracy_difference']:+.1f} points ({100 * off[0]:+.1f} to {100 * off[1]:+.1f})"
            )
            ratio = f"{figures['time_ratio']:.2f} ({time[0]:.2f} to {time[1]:.2f})"
            rows.append([f"{TEXTS[task]}, {figures['seeds']} seeds", ratio, *accuracies, difference])
    header = ["MiniLM-L6 fine-tuned on", "time, in Trainer's (95%)", "accuracy, `Trainer`", "`LGPTrainer`"]
    return table([*header, "difference (95%)"], rows)


TABLES: dict[str, list[Callable[[], str | None]]] = {
    "README.md": [headline, partial(baselines, "time_to_accuracy_scratch*"), coverage],
    "docs/measurements.md": [
        time_to_accuracy,
        no_gain,
        baselines,
        ablation,
        arms,
        equal_epochs,
        noise,
        predictability,
        step_cost,
        versions,
        paper_cost,
        paper_launches,
        finetune_text,
    ],
    "docs/compatibility.md": [architectures, seeds_of_architectures],
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into the documents")
    options = parser.parse_args()
    for name, makes in TABLES.items():
        text = "\n\n".join(drawn for make in makes if (drawn := make()) is not None)
        if not options.write:
            print(text)
            continue
        document = ROOT / name
        before, rest = document.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
        inside = f"{text}\n\n" if text else ""
        document.write_text(f"{before}{START}\n\n{inside}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
