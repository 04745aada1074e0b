"""What a step with predictions costs, in units of one exact step of the whole micro-batch.

Every step of a real ``LGPTrainer`` run is timed beside its parts, interleaved in one run on the same batch: the exact step of
the whole batch, the exact step of the control examples alone, and the no-grad forward of the prediction examples. Steps are
timed over whole cycles of refits and basis moves, so the means amortise both. One more cycle is profiled for the time and
memory of every part of a step.

Noise images do for all but one thing: whether the regression is used beside the path depends on what it explains. With ``--data`` the
images are CIFAR-10's, scaled to the model's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, VITS, Augmented, build_vit, environment, load_cifar, timed, write_json
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer, TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.settings import LGPSettings

PARTS = (
    "predict",
    "path",
    "path_coordinates",
    "correction",
    "lift",
    "capture",
    "observe",
    "refit",
    "move_bases",
)
"""Profiled ranges of a step; ``correction`` contains ``path``, ``path_coordinates`` and ``lift`` (the path's sum with it)."""


class RandomImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Noise images."""

    def __init__(self, size: int, count: int = 4096) -> None:
        self.pixels = torch.randn(256, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index % 256], "labels": torch.tensor(index % 10)}


def cifar_at(size: int, folder: Path) -> torch.utils.data.Dataset[dict[str, Tensor]]:
    """The first images of CIFAR-10 at another size."""
    images, labels = load_cifar(folder, "train", 4096)
    if images.shape[-1] != size:
        images = nn.functional.interpolate(images.float(), size=size, mode="bilinear").round().byte()
    return Augmented(images, labels)


class TimedTrainer(LGPTrainer):
    """Times each step and its parts; every gradient but that of the step itself is thrown away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[dict[str, float]] = []
        self.regressed: list[bool] = []
        self.profiler: profile | None = None
        self.peaks: dict[str, float] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        device = self.args.device
        inputs = self._prepare_inputs(inputs)
        examples = inputs["labels"].shape[0]
        predicting = self._lgp_engine is not None and self._lgp_engine.controls(examples) < examples
        if not predicting:
            return super().training_step(model, inputs, num_items_in_batch)
        controls = self._lgp_engine.controls(examples)
        if self.profiler is not None:
            with record_function("hf_lgp.step"):
                return super().training_step(model, inputs, num_items_in_batch)

        def exact(count: int) -> None:
            part = {name: value[:count] for name, value in inputs.items()}
            Trainer.training_step(self, model, part, torch.tensor(count, device=device))

        def forward() -> None:
            with torch.no_grad():
                self.model(pixel_values=inputs["pixel_values"][controls:])

        result: list[Tensor] = []
        engine = self._lgp_engine
        prediction = 0.0

        def clocked(owner: Any, name: str, share: float) -> None:
            work = getattr(owner, name)

            def run(*args: Any) -> Any:
                nonlocal prediction
                start = time.perf_counter()
                try:
                    return work(*args)
                finally:
                    prediction += share * (time.perf_counter() - start)

            setattr(owner, name, run)

        def predicted() -> None:
            result.append(LGPTrainer.training_step(self, model, inputs, num_items_in_batch))

        self._lgp_engine = None  # the parts are plain Trainer's, without our loss hook
        cell = {}
        for name, work in (
            ("exact", lambda: exact(examples)),
            ("control", lambda: exact(controls)),
            ("forward", forward),
        ):
            cell[name] = self.timed(name, work)
            model.zero_grad()
        self._lgp_engine = engine
        rest = 1 - controls / examples
        clocks = [(engine, "predict", 1.0), (engine, "_assemble", rest), (engine.path, "gradients", rest)]
        if device.type == "cpu" and engine.path is not None:  # on a GPU the profile tells
            for owner, name, share in clocks:
                clocked(owner, name, share)
        cell["predicted"] = self.timed("predicted", predicted)
        for owner, name, _ in clocks:
            vars(owner or engine).pop(name, None)
        cell["prediction"] = prediction
        self.times.append(cell)
        self.regressed.append(engine.controller.plan.ridge)
        return result[0]

    def timed(self, name: str, work: Any) -> float:
        device = self.args.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            base = torch.cuda.memory_allocated(device)
        seconds = timed(device, work)
        if device.type == "cuda":
            peak = (torch.cuda.max_memory_allocated(device) - base) / 2**20
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
        return seconds


class ProfileLastCycle(TrainerCallback):
    """Profiles the steps from ``first`` to the end of training."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.trainer: TimedTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.global_step == self.first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device.type == "cuda" else [])]
            self.trainer.profiler = profile(activities=activities, profile_memory=True)
            self.trainer.profiler.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None and self.trainer.profiler is not None
        self.trainer.profiler.stop()

    def parts(self, steps: int) -> dict[str, dict[str, float]]:
        """Milliseconds per step on the host, and on the device if there is one, and MiB allocated and freed, of each part."""
        assert self.trainer is not None and self.trainer.profiler is not None
        events = {event.key: event for event in self.trainer.profiler.key_averages()}
        table = {}
        for part in ("step", *PARTS):
            event = events.get(f"hf_lgp.{part}")
            if event is not None:
                table[part] = {
                    "host_ms": event.cpu_time_total / 1e3 / steps,
                    "device_ms": event.device_time_total / 1e3 / steps,
                    "net_host_mib": event.cpu_memory_usage / 2**20 / steps,
                    "net_device_mib": event.device_memory_usage / 2**20 / steps,
                }
        return table


def measure(
    vit: str,
    batch: int,
    fraction: float,
    cycles: int,
    bf16: bool,
    attention: str | None,
    use_cpu: bool,
    folder: Path | None,
    **settings: Any,
) -> dict[str, Any]:
    """Time ``cycles`` cycles of basis moves and summarise them as ratios to the exact step."""
    size = VITS[vit]["image_size"]
    model = build_vit(vit, attn_implementation=attention)
    with tempfile.TemporaryDirectory() as output:
        args = LGPTrainingArguments(
            output,
            per_device_train_batch_size=batch,
            max_steps=10**6,
            bf16=bf16,
            use_cpu=use_cpu,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            lgp_control_fraction=fraction,
            **settings,
        )
        chosen = LGPSettings.from_arguments(args).resolved(args.lgp_class_path)
        warmup = -(-chosen.warmup_examples // min(batch, args.lgp_observe_examples)) + 4
        args.max_steps = warmup + (cycles + 2) * chosen.basis_steps
        last = ProfileLastCycle(args.max_steps - chosen.basis_steps)
        data = RandomImages(size) if folder is None else cifar_at(size, folder)
        trainer = last.trainer = TimedTrainer(model, args, train_dataset=data, callbacks=[last])
        trainer.train()
        parts = last.parts(chosen.basis_steps)
        times = trainer.times[-cycles * chosen.basis_steps :]
        means = {name: statistics.fmean(cell[name] for cell in times) for name in times[0]}
        medians = {name: statistics.median(cell[name] for cell in times) for name in times[0]}
        overhead = means["predicted"] - means["control"] - means["forward"]
        return {
            "vit": vit,
            "images": "noise" if folder is None else "CIFAR-10",
            "parameters": sum(p.numel() for p in model.parameters()),
            "batch": batch,
            "fraction": fraction,
            "bf16": bf16,
            "attention": model.config._attn_implementation,
            "steps": len(times),
            "class_path": args.lgp_class_path,
            "regression": statistics.fmean(trainer.regressed[-len(times) :]),  # share of the steps that used it
            "observe_steps": chosen.observe_steps,
            "refit_steps": chosen.refit_steps,
            "basis_steps": chosen.basis_steps,
            "window": args.lgp_window,
            "rank": args.lgp_rank,
            "mean_seconds": means,
            "median_seconds": medians,
            "step_ratio": means["predicted"] / means["exact"],
            "step_ratio_of_medians": medians["predicted"] / medians["exact"],
            "control_ratio": means["control"] / means["exact"],
            "forward_ratio": means["forward"] / means["exact"],
            "overhead_ratio": overhead / means["exact"],
            # Prediction pass and the path of the prediction examples, its sum and the lift included.
            "prediction_per_example": means["prediction"] / (1 - fraction) / means["exact"] if use_cpu else None,
            "parts": parts,
            "peak_mib_above_start": trainer.peaks,
            "environment": environment(trainer.args.device),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit", nargs="+", choices=list(VITS), default=["width-384"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.25])
    parser.add_argument("--cycles", type=int, default=4, help="cycles of basis moves to time, after one for warming up")
    parser.add_argument("--ridge-alone", action="store_true", help="without the class-token path")
    parser.add_argument("--basis", type=int, default=0, help="0 for the default")
    parser.add_argument("--observe", type=int, default=0, help="0 for the default")
    parser.add_argument("--refit", type=int, default=0, help="0 for the default")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as train.parquet; noise images without")
    parser.add_argument("--name", default="step_cost", help="first part of the result file's name")
    parser.add_argument("--fp32", action="store_true", help="without bf16 autocast")
    parser.add_argument(
        "--attention", choices=["sdpa", "eager"], help="implementation of attention, transformers' choice by default"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    use_cpu = options.cpu or not torch.cuda.is_available()
    cells = []
    for vit in options.vit:
        for fraction in options.fraction:
            settings = {
                "lgp_class_path": not options.ridge_alone,
                "lgp_basis_steps": options.basis,
                "lgp_observe_steps": options.observe,
                "lgp_refit_steps": options.refit,
            }
            cell = measure(
                vit,
                options.batch,
                fraction,
                options.cycles,
                not options.fp32,
                options.attention,
                use_cpu,
                options.data,
                **settings,
            )
            print(
                f"{vit} batch {options.batch} fraction {fraction}: step {cell['step_ratio']:.3f} of an exact step = control "
                f"{cell['control_ratio']:.3f} + forward {cell['forward_ratio']:.3f} + overhead {cell['overhead_ratio']:.3f}; "
                f"a prediction {cell['prediction_per_example']} of an exact example; "
                f"peak MiB {cell['peak_mib_above_start']}",
                flush=True,
            )
            cells.append(cell)
            write_json(options.output / f"{options.name}_{'cpu' if use_cpu else 'cuda'}.json", {"cells": cells})


if __name__ == "__main__":
    main()
