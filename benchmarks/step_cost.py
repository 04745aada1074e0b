"""What a step with predictions costs, in units of one exact step of the same batch.

All kinds of steps, forward and backward, take turns in one process on the same noise images; a ratio compares two steps of one round, and what is
reported is the median of ratios over rounds. A predicted step is split into its parts by running two of them alone: the
forward without a graph of the examples that are predicted, and the exact step of the control examples; the rest is the walk, notes and
assembly. ``kappa = (cost - f) / (1 - f)`` is the price of one predicted example in exact ones: against ``Trainer``'s step, and against the
cheaper exact step of ``LGPTrainer`` whose last block runs on one row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import BATCHES, RESULTS, VITS, build_vit, environment, random_images, timed, write_json

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import GROUPS, StepPlan
from hf_lgp.estimator import control_size
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows.compiled import Compiled
from hf_lgp.rows.leaves import run_eagerly
from hf_lgp.rows.parts import forward_replaced
from hf_lgp.rows.walk import RowBudget

EXACT, ONE_ROW = "exact", "exact, last block on one row"
_BUDGET = RowBudget(groups=2, singly=2)


class Steps:
    """Steps of one model on one batch.

    Args:
        vit: The model, by its name in ``common.py``.
        batch: Examples.
        budget: Rows that the walk follows.
        device: Where it is trained.
        bf16: Whether in autocast.
        attention: Implementation of attention; None for transformers' choice.
        compiled: Whether ``Trainer``'s steps run the compiled model, and predicted ones compiled blocks; others are not compiled.
    """

    def __init__(
        self,
        vit: str,
        batch: int,
        budget: RowBudget,
        device: torch.device,
        bf16: bool,
        attention: str | None,
        compiled: bool = False,
    ) -> None:
        self.model = build_vit(vit, attn_implementation=attention).to(device)
        self.run = Compiled("inductor") if compiled else None
        self.whole = torch.compile(self.model) if compiled else self.model
        self.pixels, self.labels = (part.to(device) for part in random_images(vit, batch))
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        run = self.run or run_eagerly
        self.method: RowWalk = row_walk(self.model, self.loss, min(4, batch), budget, intercepted_attention, bf16, run)
        (self.stack,) = self.method.stacks

    def loss(self, count: int, plain: bool = False) -> torch.Tensor:
        """The loss of the first examples."""
        model = self.whole if plain else self.model
        with self.autocast():
            return model(pixel_values=self.pixels[:count], labels=self.labels[:count]).loss

    def step(self, plan: StepPlan, count: int) -> None:
        """Forward and backward of the first examples by a plan."""
        with self.method.splice(plan, lambda _: None):
            self.loss(count, plan.plain).backward()

    def others(self, count: int) -> None:
        """The forward of the predicted examples, without the last block if that runs on one row."""
        last = self.stack.parts[-1].block
        skipped = [(last, lambda hidden, *_, **__: hidden)] if self.stack.first_row_only else []
        with torch.no_grad(), forward_replaced(*skipped):
            self.loss(count)


def kinds_of(steps: Steps, fractions: list[float]) -> dict[str, Callable[[int], Any]]:
    """What takes turns, by name: each is given the number of the round."""
    m, one_row = len(steps.labels), steps.stack.first_row_only
    plans = {EXACT: StepPlan(), ONE_ROW: StepPlan(first_row=one_row)}
    plans |= {f"f = {f:g}": StepPlan(f, first_row=one_row) for f in fractions}
    plans["exact, measuring"] = StepPlan(measure=GROUPS, first_row=one_row)
    plans |= {f"f = {f:g}, measuring": StepPlan(f, GROUPS, one_row) for f in fractions if control_size(m, f) >= GROUPS}
    if one_row:
        plans |= {f"f = {f:g}, last block predicted as well": StepPlan(f) for f in fractions if f == 0.25}
    works: dict[str, Callable[[int], Any]] = {}
    for name, plan in plans.items():
        works[name] = lambda number, plan=plan: steps.step(replace(plan, seed=number), m)
    for f in fractions:
        controls = control_size(m, f)
        works[f"forward of the others, {f:g}"] = lambda _, count=m - controls: steps.others(count)
        works[f"control examples, {f:g}"] = lambda _, count=controls: steps.step(StepPlan(first_row=one_row), count)
    return works


def measure(
    vit: str,
    batch: int,
    fractions: list[float],
    rounds: int,
    budget: RowBudget = _BUDGET,
    device: torch.device | None = None,
    bf16: bool = False,
    attention: str | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Time all kinds of steps in turns, after two rounds for warming up, or a dozen in which what recurs is compiled."""
    device = device or torch.device("cpu")
    steps = Steps(vit, batch, budget, device, bf16, attention, compiled)
    works = kinds_of(steps, fractions)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    warming = 12 if compiled else 2
    for number in range(-warming, rounds):
        for name in list(works)[:: 1 if number % 2 else -1]:
            steps.model.zero_grad()
            took = timed(device, lambda name=name, number=number: works[name](number + warming))
            if number >= 0:
                seconds[name].append(took)
    found: dict[str, Any] = {}
    for name in (name for name in works if not name.startswith(("forward", "control"))):
        ratios, own = ([a / b for a, b in zip(seconds[name], seconds[of], strict=True)] for of in (EXACT, ONE_ROW))
        quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found[name] = {"cost": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]}
        found[name]["against_own_exact"] = statistics.median(own)
    for f in fractions:
        figures = found[f"f = {f:g}"]
        figures["kappa"] = (figures["cost"] - f) / (1 - f)
        figures["kappa_against_own_exact"] = (figures["against_own_exact"] - f) / (1 - f)
        whole, others, control, exact = (
            seconds[name] for name in (f"f = {f:g}", f"forward of the others, {f:g}", f"control examples, {f:g}", EXACT)
        )
        figures["others"] = statistics.median(a / b for a, b in zip(others, exact, strict=True))
        figures["control"] = statistics.median(a / b for a, b in zip(control, exact, strict=True))
        rest = ((w - o - c) / e for w, o, c, e in zip(whole, others, control, exact, strict=True))
        figures["walk_and_rest"] = statistics.median(rest)
    return {
        "vit": vit,
        "parameters": sum(p.numel() for p in steps.model.parameters()),
        "rows": (VITS[vit]["image_size"] // VITS[vit]["patch_size"]) ** 2 + 1,
        "batch": batch,
        "groups": budget.groups,
        "single_rows": budget.singly,
        "bf16": bf16,
        "attention": steps.model.config._attn_implementation,
        "one_row": steps.stack.first_row_only,
        "compiled": dict(steps.run.graphs) if steps.run is not None else None,
        "rounds": rounds,
        "exact_seconds": statistics.median(seconds[EXACT]),
        "steps": found,
        "environment": environment(device),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit", choices=list(VITS), default="cifar-101")
    parser.add_argument("--batch", type=int, default=0, help="0: 96 for cifar-101, 64 for others")
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.5, 0.25, 0.125, 0.0625])
    parser.add_argument("--groups", type=int, default=2, help="means of rows that the walk follows")
    parser.add_argument("--single-rows", type=int, default=2, help="rows that it follows one by one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true", help="autocast; float32 otherwise")
    parser.add_argument("--attention", choices=["sdpa", "eager"], help="transformers' choice by default")
    parser.add_argument("--compile", action="store_true", help="Trainer's steps, and blocks of predicted ones")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--smoke", action="store_true", help="two rounds, to see whether it runs")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    result = measure(
        options.vit,
        options.batch or BATCHES.get(options.vit, 64),
        options.fraction,
        2 if options.smoke else options.rounds,
        RowBudget(options.groups, options.single_rows),
        device,
        options.bf16,
        options.attention,
        options.compile,
    )
    print(f"{options.vit}, batch {result['batch']}: an exact step takes {result['exact_seconds']:.3f} s; in its time:")
    for name, figures in result["steps"].items():
        parts = ", ".join(f"{key} {value:.3f}" for key, value in figures.items() if isinstance(value, float))
        print(f"{name}: {parts}")
    name = (
        options.name
        or f"step_cost_{options.vit}_{device.type}{'_compiled' * options.compile}{'_smoke' * options.smoke}"
    )
    write_json(options.output / f"{name}.json", result)


if __name__ == "__main__":
    main()
