"""Started by torchrun: trains on two processes and checks that all ranks hold the same parameters."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments


def main(folder: str, find_unused: str) -> None:
    torch.set_num_threads(1)
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=30,
        learning_rate=1e-2,
        gradient_accumulation_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=find_unused == "True",
        lgp_control_fraction=0.5,
        lgp_warmup_examples=32,
        lgp_window=64,
        lgp_rank=3,
    )
    trainer = LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=TinyImages(96, dtype=torch.float32))
    trainer.train()
    assert trainer._lgp_steps["predicted"] > 20, trainer._lgp_steps
    for name, parameter in trainer.model.named_parameters():
        mine = parameter.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, parameter), f"{name} differs between ranks"
    print(f"rank {dist.get_rank()} agrees", flush=True)
    dist.barrier()
    os._exit(0)  # the check is done, and gloo's teardown aborts or hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
