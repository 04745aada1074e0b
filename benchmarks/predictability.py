"""How well gradients of single examples are predicted, tensor by tensor, after some steps of training: a ViT on CIFAR-10.

Exact gradients of held-out examples come from one backward each. Predicted ones come from the walk, one example at a time: the embeddings' from what it
says of the blocks' input; the last block, if it runs on one row, and what is behind it are exact. Of every tensor,

    explained at alpha = 1:  1 - tr Var(g - g~) / tr Var(g)          squared correlation:  Cov(g, g~)^2 / (tr Var(g) tr Var(g~))

``mean`` is that over tensors, ``weighted`` weights them by ``tr Var(g)``. The classifier is left out, since it is exact, and key biases, since
they have no gradient but rounding.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy_tasks import resized
from common import RESULTS, VITS, BatchAugmented, build_vit, environment, load_cifar, write_json
from torch import Tensor, nn

from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.plan import StepPlan
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows.block import noting
from hf_lgp.rows.leaves import leaves_of
from hf_lgp.rows.notes import BlockNotes
from hf_lgp.rows.parts import BlockParts, forward_replaced
from hf_lgp.rows.walk import HowToWalk, RowBudget, walk

Gradients = dict[str, Tensor]


class Moments:
    """Sums over examples of a tensor's exact and predicted gradients, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []
        self.products = torch.zeros(3, dtype=torch.float64)

    def add(self, exact: Tensor, predicted: Tensor) -> None:
        """Add one example."""
        g, h = exact.double().flatten(), predicted.double().flatten()
        self.count += 1
        self.sums = [s + t for s, t in zip(self.sums, (g, h), strict=True)] if self.sums else [g, h]
        self.products += torch.stack([g @ g, h @ h, g @ h])

    def figures(self) -> tuple[float, float, float]:
        """``tr Var(g)``, what is explained at ``alpha = 1``, and the squared correlation."""
        g, h = self.sums
        gg, hh, gh = (self.products - torch.stack([g @ g, h @ h, g @ h]) / self.count).tolist()
        if gg <= 0.0:
            return 0.0, 0.0, 0.0
        return gg / (self.count - 1), 1.0 - (gg + hh - 2.0 * gh) / gg, gh * gh / (gg * hh) if hh > 0.0 else 0.0


def trained(
    model: nn.Module, batches: Callable[[], dict[str, Tensor]], marks: list[int], learning_rate: float, decay: float
) -> Iterator[int]:
    """Train plainly with AdamW, and pause after each of the given numbers of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=decay)
    for step in range(1, max(marks) + 1):
        model.train()
        optimizer.zero_grad()
        model(**batches()).loss.backward()
        optimizer.step()
        if step in marks:
            model.eval()
            yield step


def exact_gradients(model: nn.Module, example: dict[str, Tensor]) -> Gradients:
    """Those of one example, by one backward."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(model(**example).loss, list(named.values())), strict=True))


def predicted_gradients(
    model: nn.Module, method: RowWalk, example: dict[str, Tensor], budgets: list[RowBudget]
) -> dict[RowBudget, Gradients]:
    """The predictions for one example, by number of rows followed; what a predicted step has exactly is exact."""
    (stack,) = method.stacks
    parts = stack.predicted_parts(first_row=True)
    notes: list[BlockNotes] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def noted(part: BlockParts, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad(), noting(part) as tell:
                out = forward(hidden, *args, **kwargs)
            entered.append(hidden)
            notes.append(BlockNotes(hidden.detach(), args, kwargs, frozenset(), tell()))
            left.append(out.requires_grad_(part is parts[-1]))
            return out

        return run

    replaced = [(part.block, noted(part, part.block.forward)) for part in parts]
    named = dict(model.named_parameters())
    leaves = leaves_of([part.block for part in parts], None)
    with forward_replaced(*replaced), method.splice(StepPlan(first_row=True), lambda _: None):
        loss = model(**example).loss
    delta, *behind = torch.autograd.grad(loss, [left[-1], *named.values()], allow_unused=True)
    predictions = {}
    for budget in budgets:
        own: dict[int, Tensor | None] = {}
        for step in walk(parts, notes, delta, leaves, HowToWalk(budget, intercepted_attention)):
            own.update(step.own)
            of_h0 = step.of_hidden
        before = torch.autograd.grad(
            entered[0], list(named.values()), of_h0, allow_unused=True, retain_graph=budget != budgets[-1]
        )
        found = {n: b if b is not None else a for n, a, b in zip(named, before, behind, strict=True)}
        found |= {name: own[id(p)] for name, p in named.items() if own.get(id(p)) is not None}
        predictions[budget] = {n: torch.zeros_like(p) if found[n] is None else found[n] for n, p in named.items()}
    return predictions


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: ``embeddings``, ``block 0`` and so on, or ``final norm``."""
    layer = re.search(r"layers?\.(\d+)\.", name)
    if layer:
        return f"block {layer.group(1)}"
    return "embeddings" if "embeddings" in name else "final norm"


def label(budget: RowBudget) -> str:
    """A budget as results name it."""
    return f"K = {budget.groups}, R = {budget.singly}"


def measure(model: nn.Module, examples: dict[str, Tensor], budgets: list[RowBudget]) -> dict[str, Any]:
    """How well the gradients of held-out examples are predicted, by number of rows followed."""

    def few(part: slice) -> dict[str, Tensor]:
        return {name: value[part] for name, value in examples.items()}

    method = row_walk(model, lambda count: model(**few(slice(count))).loss, 4, budgets[0], intercepted_attention, False)
    (stack,) = method.stacks
    rounding = {id(part.key.bias) for part in stack.parts if part.key is not None and part.key.bias is not None}
    kept = [n for n, p in model.named_parameters() if "classifier" not in n and id(p) not in rounding]
    moments = {k: {name: Moments() for name in kept} for k in budgets}
    count = len(examples["labels"])
    errors = {k: [0.0] * count for k in budgets}
    for i in range(count):
        example = few(slice(i, i + 1))
        exact = exact_gradients(model, example)
        for k, predicted in predicted_gradients(model, method, example, budgets).items():
            for name in kept:
                moments[k][name].add(exact[name], predicted[name])
                errors[k][i] += float((exact[name] - predicted[name]).square().sum())
    result: dict[str, Any] = {"examples": count, "last_block_on_one_row": stack.first_row_only}
    for k in budgets:
        figures = {name: moment.figures() for name, moment in moments[k].items()}
        figures = {name: row for name, row in figures.items() if row[0] > 1e-12}
        result[label(k)] = {
            "explained": summary({name: (row[0], row[1]) for name, row in figures.items()}),
            "squared_correlation": summary({name: (row[0], row[2]) for name, row in figures.items()}),
            # Of few examples, one can make up most of what is not explained.
            "share_of_worst_example": max(errors[k]) / max(sum(errors[k]), 1e-300),
        }
    return result


def summary(figures: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Of variances and shares by tensor: mean, weighted mean and worst share, and the weighted mean of each part of the model."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for name, row in figures.items():
        parts.setdefault(part_of(name), []).append(row)

    def weighted(rows: list[tuple[float, float]]) -> float:
        return sum(variance * share for variance, share in rows) / sum(variance for variance, _ in rows)

    worst = min(figures, key=lambda name: figures[name][1])
    return {
        "mean": sum(share for _, share in figures.values()) / len(figures),
        "weighted": weighted(list(figures.values())),
        "worst": figures[worst][1],
        "worst_tensor": worst,
        "below_0.9": sorted(name for name, (_, share) in figures.items() if share < 0.9),
        "by_part": {part: weighted(rows) for part, rows in parts.items()},
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=f"{__doc__.splitlines()[0]} Prints mean / weighted / worst tensor.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet and test.parquet"
    )
    parser.add_argument("--vit", choices=list(VITS), default="cifar-0.8m")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 300], help="steps of training to measure after")
    parser.add_argument(
        "--rows", nargs="+", default=["4+0", "8+0", "2+2", "4+2", "4+4"], help="K+R: means, and rows by themselves"
    )
    parser.add_argument("--examples", type=int, default=24, help="held-out examples")
    parser.add_argument("--images", type=int, default=12_800, help="training images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two steps, to see whether it runs")
    parser.add_argument("--name", default="predictability", help="name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.images, options.examples, options.batch = [2], 64, 6, 16
        options.name += "_smoke"
    side = VITS[options.vit]["image_size"]
    of_split = {}
    for split, count in (("train", options.images), ("test", options.examples)):
        images, labels = load_cifar(options.data, split, count)
        of_split[split] = BatchAugmented(resized(images, side), labels, augment=False)
    budgets = [RowBudget(*map(int, given.split("+"))) for given in options.rows]
    held_out = of_split["test"](list(range(options.examples)))
    model = build_vit(options.vit, seed=options.seed)
    draw = torch.Generator().manual_seed(options.seed)

    def batches() -> dict[str, Tensor]:
        return of_split["train"](torch.randint(0, options.images, (options.batch,), generator=draw).tolist())

    settings = {name: value for name, value in vars(options).items() if name not in ("data", "output", "name")}
    result: dict[str, Any] = {"settings": settings, "environment": environment(torch.device("cpu")), "steps": {}}
    for step in trained(model, batches, options.steps, options.learning_rate, options.weight_decay):
        result["steps"][step] = measured = measure(model, held_out, budgets)
        for budget in budgets:
            for kind in ("explained", "squared_correlation"):
                figures = measured[label(budget)][kind]
                three = f"{figures['mean']:.3f} / {figures['weighted']:.3f} / {figures['worst']:.3f}"
                few = ", ".join(figures["below_0.9"]) or "none"
                print(f"step {step}, {label(budget)}, {kind}: {three}; below 0.9: {few}", flush=True)
        write_json(options.output / f"{options.name}.json", result)


if __name__ == "__main__":
    main()
