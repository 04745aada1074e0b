"""What two processes do: train, and check that all ranks hold the same parameters and decide the same; also started by launchers.

python two_processes.py FOLDER KIND...    the kinds are functions of this file, called one after the other
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import TrainerCallback

import hf_lgp.session
from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.control.clock import Lap


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {
                name.removeprefix("module."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }


def one_step(folder: str, data: Any) -> dict[str, Tensor]:
    """Gradients of one predicted step on the first batches of some data, in their order."""
    seen = Gradients()
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=0.5,
        lgp_groups=1,
        lgp_single_rows=1,
    )
    trainer = LGPTrainer(tiny_vit(), arguments, train_dataset=data, callbacks=[seen])
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 1}
    return seen.first


def trained(folder: str, collate: Any = None, **settings: Any) -> LGPTrainer:
    """A run with accumulation over epochs whose last batch is not whole; parameters must end up the same everywhere."""
    arguments = LGPTrainingArguments(
        folder,
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "max_steps": 20,
            "learning_rate": 1e-2,
            "gradient_accumulation_steps": 2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    data = TinyImages(90, dtype=torch.float32)
    trainer = LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter), f"{name} differs between ranks"
    return trainer


def gradients(folder: str) -> None:
    found = one_step(folder, TinyImages(8))
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "gradients.pt")


def fixed(folder: str) -> None:
    steps = trained(folder, lgp_control_fraction=0.5)._lgp_steps
    assert steps["exact"] == 0 and steps["predicted"] > 36, steps


def unused_parameters_looked_for(folder: str) -> None:
    trained(folder, lgp_control_fraction=0.5, ddp_find_unused_parameters=True)


def compiled(folder: str) -> None:
    trained(folder, lgp_control_fraction=0.5, torch_compile=True, torch_compile_backend="aot_eager")


def automatic(folder: str) -> None:
    """Every process has a clock of its own; by that of the second one alone, predictions would be dearer than exact steps."""
    rank, plans = int(os.environ["RANK"]), []
    plan_of, seconds_of = hf_lgp.session.Session.plan, Lap.seconds

    def plan(self: Any, *args: Any) -> Any:
        found = plan_of(self, *args)
        plans.append((found.fraction, found.measure, found.first_row))
        return found

    def mark(device: Any) -> Any:
        """The moment is told by what is done in it."""
        return plans[-1]

    def seconds(self: Lap) -> float:
        fraction, measure, _ = self.ended
        dear = 1.2 if rank else 0.2
        return (1.5 if measure else 1.0 if fraction == 1.0 else dear) * (1.0 + 0.01 * rank)

    hf_lgp.session.Session.plan, Lap.seconds, hf_lgp.session.mark = plan, seconds, mark  # type: ignore[method-assign]
    trainer = trained(folder, max_steps=60, lgp_exact_steps=4, lgp_variance_budget=0.0)
    Lap.seconds = seconds_of  # type: ignore[method-assign]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (plans, asdict(trainer._lgp.controller)))
    assert everyones[0] == everyones[1], "plans differ between ranks"
    assert trainer._lgp_steps["predicted"] > 20, trainer._lgp_steps


def batches_of_other_sizes(folder: str) -> None:
    """A collator that leaves examples out: sixteen in one process are eleven in the other, or one."""
    rank, calls = int(os.environ["RANK"]), iter(range(10**9))

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        kept = rows if rank == 0 else rows[: 1 if next(calls) % 5 == 0 else 11]
        return {name: torch.stack([row[name] for row in kept]) for name in rows[0]}

    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "lgp_exact_steps": 0}
    for fraction, predictor in ((0.125, "auto"), (0.0, "auto"), (0.0, "linear")):
        trainer = trained(folder, collate, lgp_control_fraction=fraction, lgp_predictor=predictor, **settings)
        known, everyones = asdict(trainer._lgp.controller), list[Any]([None] * dist.get_world_size())
        known.pop("saved")  # seconds of a process's own examples
        dist.all_gather_object(everyones, known)
        assert everyones[0] == everyones[1]
        assert not fraction or trainer._lgp.controller.measurements > 0, trainer._lgp.controller


def listened_to_in_one(folder: str) -> None:
    """A hook that one process alone has, to log: all train exactly."""
    init = LGPTrainer.__init__

    def listening(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if int(os.environ["RANK"]) == 0:
            model.vit.layers[-1].mlp.register_forward_hook(lambda *_: None)
        init(self, model, *args, **kwargs)

    LGPTrainer.__init__ = listening  # type: ignore[method-assign]
    trainer = trained(folder, lgp_control_fraction=0.0, max_steps=24)
    assert trainer._lgp.refused is not None and trainer._lgp_steps["predicted"] == 0
    LGPTrainer.__init__ = init  # type: ignore[method-assign]


def main(folder: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    for kind in kinds:
        globals()[kind](folder)
        print(f"rank {dist.get_rank()} agrees in {kind}", flush=True)
    dist.barrier()
    os._exit(0)  # the check is done, and gloo's teardown aborts or hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
