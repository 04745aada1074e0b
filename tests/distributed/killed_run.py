"""A run with checkpoints that may be killed at some step, or go on from the last one; also started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import TinyImages, tiny_vit
from transformers import TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments

STEPS, SAVED_EVERY = 26, 5


class Killed(TrainerCallback):
    """Ends this process as ``kill -9`` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_for(folder: str, killed_after: int = -1) -> LGPTrainer:
    """A ViT with dropout, accumulation, clipping, a schedule, and few checkpoints kept."""
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=SAVED_EVERY,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        lgp_control_fraction=0.5,
    )
    data = TinyImages(54, dtype=torch.float32)  # an epoch ends within an accumulation
    model = tiny_vit(torch.float32, dropout=0.1)
    return LGPTrainer(model, arguments, train_dataset=data, callbacks=[Killed(killed_after)])


def final_state(trainer: LGPTrainer) -> dict[str, Any]:
    """Everything that training has made, but for what depends on the clock."""
    session = trainer._lgp
    assert session is not None
    _, numbers = session.state_dict()
    for name in ("times", "saved"):
        numbers["controller"].pop(name)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "trained": {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "losses": [{key: entry[key] for key in ("step", "loss", "grad_norm", "lgp/fraction")} for entry in logged],
            "steps": trainer._lgp_steps,
        },
        "measured": {"session": numbers, "variances": [entry.get("lgp/variance") for entry in logged]},
    }


def main(folder: str, killed_after: str, checkpoint: str = "") -> None:
    torch.set_num_threads(1)
    trainer = trainer_for(folder, int(killed_after))
    trainer.train(resume_from_checkpoint=checkpoint or None)
    assert trainer._lgp_steps["predicted"] > 40, trainer._lgp_steps
    state = final_state(trainer)  # of all processes together
    if trainer.is_world_process_zero():
        torch.save(state, Path(folder) / "final.pt")
    print("finished", flush=True)
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # gloo's teardown aborts or hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
