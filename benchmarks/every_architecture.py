"""Which architectures can be predicted, how well and at what price: every model of transformers that classifies images, videos, sounds or texts, small.

Each is trained plainly for some steps on a task of ``small_models.py``. Then, on held-out examples:

``explained``: of the blocks' tensors, ``1 - tr Var(g - g~) / tr Var(g)`` at ``alpha = 1`` over single examples: mean over tensors, and weighted by ``tr Var(g)``; by number of rows followed;
``step times``: of a step by control fraction and rows over that of a plain one, all timed in turns;
``price``: the least of variance times step time, and where it is reached;
``bias``: the largest difference of the mean over all control draws from the exact gradient, float64, relative to the largest gradient.

Every finished architecture is saved at once, and a second call continues where the first stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, environment, timed, write_json
from small_models import architectures, build, examples_of
from torch import Tensor, nn
from transformers.utils import logging

import hf_lgp.call
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.batches import few_of
from hf_lgp.control.measurement import GroupSpread
from hf_lgp.control.plan import StepPlan
from hf_lgp.estimator import relative_variance
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows.parts import UnknownBlock
from hf_lgp.rows.walk import RowBudget

FRACTIONS, DOUBLINGS = (0.5, 0.25, 0.125), (0, 1, 2)
Examples = dict[str, Tensor]
Order = tuple[Tensor, Tensor]


def built(reads: str, kind: type, name: str, seed: int) -> nn.Module:
    """A small model that runs; some types want heads of another width than most."""
    try:
        model = build(reads, kind, name, seed=seed)
        model(**examples_of(reads, model.config, 2, 0)).loss.backward()
    except Exception:
        model = build(reads, kind, name, own_heads=True, seed=seed)
        model(**examples_of(reads, model.config, 2, 0)).loss.backward()
    model.zero_grad()
    return model


def trained(model: nn.Module, batches: Iterator[Examples], steps: int, rate: float) -> list[float]:
    """Train plainly; gives the loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), rate), []
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def method_of(model: nn.Module, examples: Examples, budget: RowBudget, count: int = 4) -> RowWalk:
    """The verified walk, or :class:`UnknownBlock`."""
    return row_walk(model, lambda n: model(**few_of(examples, n)).loss, count, budget, intercepted_attention, False)


def explained(model: nn.Module, method: RowWalk, examples: Examples, rows: int = 0) -> dict[str, float]:
    """Shares of variance explained, over single examples."""
    spreads: list[GroupSpread] = []
    count = len(examples["labels"])
    with method.splice(StepPlan(measure=count, first_row=True, rows=rows), spreads.append):
        model(**examples).loss.backward()
    model.zero_grad()
    residual, total = (torch.cat([getattr(s, name) for s in spreads]).double() for name in ("residual", "total"))
    counted = total > 1e-9 * total.sum()  # key biases have no gradient but rounding
    shares = 1.0 - residual[counted] / total[counted]
    weighted = float(1.0 - residual.sum() / total.sum())
    return {"mean": float(shares.mean()), "weighted": weighted, "worst": float(shares.min())}


def step_times(model: nn.Module, method: RowWalk, examples: Examples, rounds: int) -> dict[str, float]:
    """Medians of ratios to a plain step's time, taken in turns, by doublings of rows and fraction."""
    plans = {"plain": StepPlan(), "0, 1": StepPlan(first_row=method.has_first_row)}
    plans |= {f"{k}, {f:g}": StepPlan(f, first_row=True, rows=k) for k in DOUBLINGS for f in FRACTIONS}

    def step(plan: StepPlan) -> None:
        with method.splice(plan, lambda _: None):
            model(**examples).loss.backward()
        model.zero_grad()

    ratios: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        seconds = {name: timed(torch.device("cpu"), lambda plan=plan: step(plan)) for name, plan in plans.items()}
        for name, own in seconds.items() if turn else ():
            ratios[name].append(own / seconds["plain"])
    medians = {name: statistics.median(of) for name, of in ratios.items() if name != "plain"}
    return medians if method.has_first_row else {**medians, "0, 1": 1.0}  # a plain step, against itself


def bias(model: nn.Module, examples: Examples, budget: RowBudget) -> float | None:
    """How far the mean over all draws of control examples, half of them, is from the exact gradient; None where an example is several of a stack's.

    Where stacks are called one after the other, every combination of their draws counts, of two examples. What has no float64 operations is taken in float32.
    """
    try:
        return _bias(model, examples, budget, torch.float64)
    except UnknownBlock:
        return _bias(model, examples, budget, torch.float32)


def _bias(model: nn.Module, examples: Examples, budget: RowBudget, dtype: torch.dtype) -> float | None:
    model = copy.deepcopy(model).to(dtype).eval()
    examples = {n: v.to(dtype) if v.is_floating_point() else v for n, v in examples.items()}
    method = method_of(model, examples, budget)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes: list[int] = []

    def gradients(count: int, plan: StepPlan, draws: Iterator[Order]) -> list[Tensor]:
        def drawn(size: int, *_: Any) -> Order:
            sizes.append(size)
            return next(draws)

        with patch.object(hf_lgp.call, "draw_order", drawn), method.splice(plan, lambda _: None):
            loss = model(**few_of(examples, count)).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    split = StepPlan(0.5, first_row=True)
    with suppress(RuntimeError):  # where an order is too short
        gradients(2, split, itertools.repeat(orders(2)[0]))
    if set(sizes) != {2}:
        return None
    count = 4 if len(sizes) == 1 else 2
    combinations = list(itertools.product(orders(count), repeat=len(sizes)))
    exact, total = gradients(count, StepPlan(), iter(())), [torch.zeros_like(p) for p in parameters]
    for draws in combinations:
        total = [s + g for s, g in zip(total, gradients(count, split, iter(draws)), strict=True)]
    largest = max(float(g.norm()) for g in exact)
    return max(float((s / len(combinations) - g).norm()) for s, g in zip(total, exact, strict=True)) / largest


def orders(count: int) -> list[Order]:
    """For every half of some examples the order in which it comes first, and its inverse."""
    sets = itertools.combinations(range(count), count // 2)
    found = [torch.tensor([*some, *(i for i in range(count) if i not in some)]) for some in sets]
    return [(order, order.argsort()) for order in found]


def measured(model: nn.Module, config: Any, reads: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a row of the table says of a model."""
    budget = RowBudget(*map(int, options.rows.split("+")))
    held_out, batch = (examples_of(reads, config, n, s) for n, s in ((24, 1), (options.batch, 2)))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        method_of(model, held_out, budget)  # or training it would tell nothing
        batches = (
            examples_of(reads, config, options.batch, 100 + k + 10_000 * options.seed) for k in itertools.count()
        )
        losses = trained(model, batches, options.steps, options.learning_rate)
        found["loss"] = [statistics.mean(losses[:5]), statistics.mean(losses[-5:])]
        method = method_of(model, held_out, budget)
        found["bias"] = bias(model, held_out, budget)
    except UnknownBlock as reason:
        return {**found, "exact_because": str(reason)}
    model.train()
    found["first_row"] = method.has_first_row
    found["blocks"] = [len(stack.parts) for stack in method.stacks]
    shares = {str(k): explained(model, method, held_out, k) for k in DOUBLINGS}
    times = step_times(model, method, batch, options.rounds)
    return {**found, "explained": shares, "step_times": times, **least_price(times, shares)}


def least_price(times: dict[str, float], shares: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The least of variance times step time, and where it is reached."""
    prices = {}
    for at, time in times.items():
        rows, fraction = at.split(", ")
        prices[at] = relative_variance(float(fraction), 1.0 - shares[rows]["weighted"]) * time
    best = min(prices, key=lambda at: prices[at])
    return {"price": prices[best], "at": best}


def argument_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="model types, and `image`, `video`, `audio`, `sequence`")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of weights and training examples")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", default="2+2", help="K+R: means, and rows by themselves")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--again", action="store_true", help="those that are known too")
    parser.add_argument("--name", default="architectures")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def main() -> None:
    """Run the command."""
    options = argument_parser().parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    path = options.output / f"{options.name}.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    rows: dict[str, Any] = result.setdefault("rows", {})
    for reads, name, kind in architectures():
        key = f"{reads}: {name}" + f", seed {options.seed}" * bool(options.seed)
        if (options.only and not {reads, name} & set(options.only)) or (key in rows and not options.again):
            continue
        try:
            model = built(reads, kind, name, options.seed)
        except Exception as error:  # a small configuration that this type does not have
            print(f"{key}: not built: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        try:
            rows[key] = measured(model, model.config, reads, options)
        except Exception as error:
            print(f"{key}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        print(f"{key}: {json.dumps(rows[key])}", flush=True)
        result |= {"settings": {n: getattr(options, n) for n in ("steps", "batch", "learning_rate", "rows")}}
        result |= {"environment": environment(torch.device("cpu"))}
        write_json(path, result)


if __name__ == "__main__":
    main()
