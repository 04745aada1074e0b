"""Extra variance of the combined gradient over the plain batch gradient, tensor by tensor, inside a real training run.

At the given steps training pauses, parameters and predictor are held still, and for a number of fresh batches both the exact
gradient ``g`` of the whole batch and the estimate ``G`` with predictions are computed. The extra variance of a tensor is
``mean |G - g|^2 / Var(g)`` with ``Var(g)`` the variance of the exact batch gradient between batches: 0 is as good as exact,
and without any prediction it is ``(1 - f) / f``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, VITS, Augmented, build_vit, environment, load_cifar, write_json
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments


class Pause(TrainerCallback):
    """Measures at the given steps; the run goes on as if it had not been interrupted."""

    def __init__(self, steps: list[int], batches: int, seed: int, save: Any) -> None:
        self.steps, self.batches, self.seed, self.save = steps, batches, seed, save
        self.trainer: LGPTrainer | None = None
        self.tables: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            assert self.trainer is not None
            devices = [args.device] if args.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed + 10_000)
                self.tables[str(state.global_step)] = self.measure(self.trainer, args)
            self.save(self.tables)

    def measure(self, trainer: LGPTrainer, args: Any) -> dict[str, Any]:
        engine, model = trainer._lgp_engine, trainer.model
        assert engine is not None and model is not None
        trunk = [(rule.name, list(rule.parameters)) for rule in engine.rules]
        states = [[trainer.optimizer.state[p] for p in parameters] for _, parameters in trunk]
        # What Adam divides by: its steps weigh an entry's noise by the entry's own scale, not by its energy.
        scales = [torch.cat([s["exp_avg_sq"].flatten().double().cpu() for s in some]) for some in states]
        learn = engine.finish

        def forget() -> None:  # holds the predictor still
            engine.observer.current = None

        engine.finish = forget  # type: ignore[method-assign]
        error = torch.zeros(len(trunk), dtype=torch.float64)
        total, squares = (
            [torch.zeros(sum(p.numel() for p in ps), dtype=torch.float64) for _, ps in trunk],
            error.clone(),
        )
        adam = torch.zeros(2, len(trunk), dtype=torch.float64)
        loader = torch.utils.data.DataLoader(trainer.train_dataset, args.per_device_train_batch_size, shuffle=True)
        iterator = iter(loader)
        for _ in range(self.batches):
            batch = trainer._prepare_inputs(next(iterator))
            gradients = []
            for step in (Trainer.training_step, LGPTrainer.training_step):
                model.zero_grad()
                kept, trainer._lgp_engine = trainer._lgp_engine, None if step is Trainer.training_step else engine
                step(trainer, model, batch)
                trainer._lgp_engine = kept
                gradients.append([flat(parameters) for _, parameters in trunk])
            for position, (exact, estimate) in enumerate(zip(*gradients, strict=True)):
                error[position] += (estimate - exact).square().sum()
                total[position] += exact
                squares[position] += exact.square().sum()
                weights = 1.0 / (scales[position] + 1e-16)
                adam[0, position] += ((estimate - exact).square() * weights).sum()
                adam[1, position] += (exact.square() * weights).sum()
        model.zero_grad()
        engine.finish = learn  # type: ignore[method-assign]
        count = self.batches
        means = torch.stack([(t / count).square().sum() for t in total])
        variance = (squares - count * means) / (count - 1)
        adam[1] -= torch.stack(
            [((t / count).square() / (v + 1e-16)).sum() * count for t, v in zip(total, scales, strict=True)]
        )
        adam /= torch.tensor([[count], [count - 1]])
        extra = (error / count / variance).tolist()
        rho2 = engine.predictor.alignment.rho2.tolist()
        return {
            "median": statistics.median(extra),
            "worst": max(extra),
            "worst_tensor": trunk[extra.index(max(extra))][0],
            "whole_gradient": (error.sum() / count / variance.sum()).item(),
            "in_adam_units": (adam[0].sum() / adam[1].sum()).item(),
            "in_adam_units_by_tensor": {
                name: round(v, 4) for (name, _), v in zip(trunk, (adam[0] / adam[1]).tolist(), strict=True)
            },
            "by_tensor": {name: round(v, 4) for (name, _), v in zip(trunk, extra, strict=True)},
            "rho2_by_tensor": {name: round(v, 4) for (name, _), v in zip(trunk, rho2, strict=True)},
        }


def flat(parameters: list[Tensor]) -> Tensor:
    """Gradients of a tensor's parameters in one float64 vector on the host."""
    return torch.cat([p.grad.flatten().double().cpu() for p in parameters if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet and test.parquet"
    )
    parser.add_argument("--vit", choices=list(VITS), default="cifar-0.8m")
    parser.add_argument("--at", type=int, nargs="+", default=[200, 1100], help="steps at which to measure")
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("observe", "refit", "basis"):
        parser.add_argument(f"--{name}", type=int, default=0, help=f"lgp_{name}_steps; 0 for the default")
    parser.add_argument("--ridge-alone", action="store_true", help="without the class-token path")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--name", default="extra_variance", help="name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = Augmented(*load_cifar(options.data, "train"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LGPTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_steps=max(options.at),
            seed=options.seed,
            use_cpu=options.cpu,
            bf16=options.bf16,
            report_to="none",
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            lgp_control_fraction=options.fraction,
            lgp_class_path=not options.ridge_alone,
            lgp_observe_steps=options.observe,
            lgp_refit_steps=options.refit,
            lgp_basis_steps=options.basis,
        )
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "output")}

        def save(tables: dict[str, Any]) -> None:
            content = {"settings": settings, "environment": environment(arguments.device), "steps": tables}
            write_json(options.output / f"{options.name}.json", content)

        callback = Pause(options.at, options.batches, options.seed, save)
        model = build_vit(options.vit, seed=options.seed)
        callback.trainer = LGPTrainer(model, arguments, train_dataset=data, callbacks=[callback])
        callback.trainer.train()
    for step, table in callback.tables.items():
        summary = {k: table[k] for k in ("median", "worst", "worst_tensor", "whole_gradient", "in_adam_units")}
        print(f"step {step}: {summary}", flush=True)
        for name, value in table["by_tensor"].items():
            print(f"  {value:8.3f}  {name}", flush=True)


if __name__ == "__main__":
    main()
