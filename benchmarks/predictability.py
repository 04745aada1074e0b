"""How well gradients are predicted over a real training run: a ViT on CIFAR-10 with ``LGPTrainer``.

Records, as training goes on, the prequential squared correlation of exact and predicted per-example gradients (every control
example is predicted before the predictor sees it), per tensor and per block; the share of gradient energy inside the
bases; the control-variate coefficients; and where the time goes. ``rho2`` always refers to the whole gradient: what lies
outside of the bases counts as unexplained.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, VITS, Augmented, build_vit, environment, load_cifar, write_json
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments

PHASES = {"steps 200-250": (200, 250), "steps 1050-1200": (1050, 1200)}
PARTS = ("capture", "path", "path_coordinates", "correction", "observe", "move_bases", "refit")


def block_of(name: str) -> str:
    """Block that a tensor belongs to: ``embeddings``, ``block 0`` ... or ``final norm``."""
    layer = re.search(r"layers?\.(\d+)\.", name)
    if layer:
        return f"block {layer.group(1)}"
    return "embeddings" if "embeddings" in name else "final norm"


class Recorder(TrainerCallback):
    """Notes the predictor's measures every few steps and profiles the last cycle of basis moves."""

    def __init__(self, every: int, profile_from: int) -> None:
        self.trainer: LGPTrainer | None = None
        self.every, self.profile_from = every, profile_from
        self.records: list[dict[str, Any]] = []
        self.profiler: profile | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        engine = self.trainer._lgp_engine
        if engine is not None and engine.predictor.ready and state.global_step % self.every == 0:
            self.records.append({"step": state.global_step, **measures(engine)})
        if state.global_step == self.profile_from:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities)
            self.profiler.start()
        elif self.profiler is not None and state.global_step == args.max_steps:
            self.profiler.stop()

    def time_shares(self) -> dict[str, float]:
        """Share of every part in the profiled time, on whichever of host and device was busier with it."""
        if self.profiler is None:
            return {}
        events = {event.key: event for event in self.profiler.key_averages()}
        device = sum(event.self_device_time_total for event in events.values())
        host = sum(event.self_cpu_time_total for event in events.values())
        shares = {}
        for part in PARTS:
            event = events.get(f"hf_lgp.{part}")
            if event is not None:
                on_device = event.device_time_total / device if device else 0.0
                shares[part] = {"host": event.cpu_time_total / host, "device": on_device}
        return shares


def measures(engine: Any) -> dict[str, Any]:
    """Readings of one moment, per tensor and summarised."""
    alignment = engine.predictor.alignment
    rho2, captured, variance = alignment.rho2, alignment.captured, alignment.variance
    path, ridge = alignment.coefficients
    blocks: dict[str, list[float]] = {}
    for rule, value in zip(engine.rules, rho2.tolist(), strict=True):
        blocks.setdefault(block_of(rule.name), []).append(value)

    def by_tensor(values: Any) -> dict[str, float]:
        return {rule.name: round(value, 4) for rule, value in zip(engine.rules, values.tolist(), strict=True)}

    return {
        "rho2_layer_mean": rho2.mean().item(),
        "rho2_raw": ((rho2 * variance).sum() / variance.sum()).item(),
        "rho2_path_alone": alignment.path_rho2.mean().item(),
        "rho2_by_block": {block: sum(values) / len(values) for block, values in blocks.items()},
        "rho2_by_tensor": by_tensor(rho2),
        "rho2_path_by_tensor": by_tensor(alignment.path_rho2),
        "captured_mean": captured.mean().item(),
        "captured_by_tensor": by_tensor(captured),
        "alpha_mean": ridge.mean().item(),
        "alpha_path_mean": path.mean().item(),
        "alpha_path_by_tensor": by_tensor(path),
        "alpha_by_tensor": by_tensor(ridge),
        "beta_by_tensor": by_tensor(alignment.beta),
        "window": engine.predictor.size,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train once and summarise."""
    model = build_vit(options.vit, seed=options.seed)
    data = Augmented(*load_cifar(options.data, "train"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LGPTrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_steps=options.steps,
            seed=options.seed,
            use_cpu=options.cpu,
            bf16=options.bf16,
            dataloader_num_workers=options.workers,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            lgp_control_fraction=options.fraction,
            lgp_window=options.window,
            lgp_rank=options.rank,
            lgp_kernel=options.kernel,
            lgp_ridge=options.ridge,
            lgp_refit_steps=options.refit,
            lgp_basis_steps=options.basis,
            lgp_observe_steps=options.observe,
            lgp_class_path=not options.ridge_alone,
        )
        recorder = Recorder(options.every, options.steps - 16)
        trainer = LGPTrainer(model, arguments, train_dataset=data, callbacks=[recorder])
        recorder.trainer = trainer
        trainer.train()
    summary = {}
    for phase, (first, last) in PHASES.items():
        inside = [record for record in recorder.records if first <= record["step"] <= last]
        if inside:
            keys = (
                "rho2_layer_mean",
                "rho2_raw",
                "rho2_path_alone",
                "captured_mean",
                "alpha_mean",
                "alpha_path_mean",
            )
            summary[phase] = {key: sum(record[key] for record in inside) / len(inside) for key in keys}
            for block in inside[0]["rho2_by_block"]:
                summary[phase][f"rho2 {block}"] = sum(r["rho2_by_block"][block] for r in inside) / len(inside)
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("data", "output")
        },
        "environment": environment(arguments.device),
        "summary": summary,
        "time_shares": recorder.time_shares(),
        "losses": [{"step": e["step"], "loss": float(e["loss"])} for e in trainer.state.log_history if "loss" in e],
        "records": recorder.records,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Squared correlation over training: layer mean, raw, and by block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = result["records"]
    steps = [record["step"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for key, label in (
        ("rho2_layer_mean", "mean over tensors"),
        ("rho2_raw", "by gradient energy"),
        ("rho2_path_alone", "class path alone"),
        ("captured_mean", "captured energy"),
    ):
        left.plot(steps, [record[key] for record in records], label=label)
    for position, block in enumerate(records[0]["rho2_by_block"]):
        colour = plt.cm.viridis(position / len(records[0]["rho2_by_block"]))
        right.plot(steps, [record["rho2_by_block"][block] for record in records], label=block, color=colour)
    for axis, title in ((left, "all tensors"), (right, "mean over the tensors of a block")):
        axis.set(xlabel="optimizer step", title=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylabel("prequential $\\rho^2$")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet and test.parquet"
    )
    parser.add_argument("--vit", choices=list(VITS), default="cifar-0.8m")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernel", choices=["linear", "rbf"], default="rbf")
    parser.add_argument("--ridge", type=float, default=LGPTrainingArguments.lgp_ridge)
    parser.add_argument("--refit", type=int, default=0, help="0 for the default")
    parser.add_argument("--basis", type=int, default=0, help="0 for the default")
    parser.add_argument("--observe", type=int, default=0, help="0 for the default")
    parser.add_argument("--ridge-alone", action="store_true", help="without the class-token path")
    parser.add_argument("--every", type=int, default=10, help="steps between two records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--name", default="predictability", help="name of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = run(options)
    write_json(options.output / f"{options.name}.json", result)
    draw(result, options.output / f"{options.name}.png")
    for phase, values in result["summary"].items():
        print(phase, {key: round(value, 3) for key, value in values.items()}, flush=True)
    print("time shares", result["time_shares"], flush=True)


if __name__ == "__main__":
    main()
