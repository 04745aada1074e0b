"""An oracle's trajectory on two processes; imported by the test, which compares with one process and the same global draw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle_trainer import OracleTrainer
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainingArguments


def trained(kind: type[OracleTrainer], folder: str, batch: int) -> dict[str, Any]:
    """Parameters and losses of twenty steps in float64."""
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=1e-1,
        optim="sgd",
        max_grad_norm=0.5,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lgp_control_fraction=0.5,
    )
    trainer = kind(tiny_vit(), arguments, train_dataset=TinyImages(64))
    trainer.train()
    assert trainer.predicted == 39, "all micro-batches but the first"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"model": trainer.model.state_dict(), "losses": losses}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    result = trained(OracleTrainer, folder, batch=4)
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        torch.save(result, Path(folder) / "trained.pt")
    dist.barrier()
    os._exit(0)  # gloo's teardown aborts or hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
