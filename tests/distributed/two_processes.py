"""Started by torchrun: trains on two processes and checks that all ranks hold the same parameters and the same predictor."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import TinyImages, tiny_vit
from torch import Tensor
from transformers import TrainerCallback

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.stopwatch import Stopwatch


def assert_same_everywhere(name: str, value: Tensor) -> None:
    mine = value.detach().clone()
    dist.broadcast(mine, 0)
    assert torch.equal(mine, value), f"{name} differs between ranks"


class Compared(TrainerCallback):
    """Compares the predictors of all ranks while they learn."""

    trainer: LGPTrainer
    windows: list[int]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer._lgp_engine
        assert engine is not None
        self.windows.append(engine.predictor.remembered)
        if state.global_step in (2, 17, args.max_steps):
            tensors, counters = engine.state_dict()
            for name, value in tensors.items():
                assert_same_everywhere(name, value)
            counters.pop("timed")  # each process's own, until they are averaged at the next review
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, json.dumps(counters))
            assert len(set(everyones)) == 1, everyones


def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=50,
        learning_rate=1e-2,
        gradient_accumulation_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=kind == "unused parameters looked for",
        torch_compile=kind == "compiled",
        torch_compile_backend="aot_eager" if kind == "compiled" else None,
        lgp_control_fraction=0.0 if kind == "automatic" else 0.5,
        lgp_exact_steps=0,
        lgp_variance_budget=0.0,
        lgp_warmup_examples=32,
        lgp_window=64,
        lgp_rank=3,
    )
    # Every process has a clock of its own; that of the second one calls predictions dear.
    seconds = {True: 1.0, False: 0.1 + 0.6 * int(os.environ["RANK"])}
    collect = Stopwatch.collect
    Stopwatch.collect = lambda self, wait=False: [(label, seconds[label[0].exact]) for label, _ in collect(self)]  # type: ignore[method-assign]
    compared = Compared()
    data = TinyImages(90, dtype=torch.float32)  # the last batch of an epoch is not whole
    trainer = LGPTrainer(tiny_vit(torch.float32), arguments, train_dataset=data, callbacks=[compared])
    compared.trainer, compared.windows = trainer, []
    trainer.train()
    if kind != "automatic":  # which times exact steps first
        assert compared.windows[0] == 2 * 2 * 8, "two micro-batches of two processes"
    assert trainer._lgp_steps["predicted"] > (60 if kind == "automatic" else 90), trainer._lgp_steps
    for name, parameter in trainer.model.named_parameters():
        assert_same_everywhere(name, parameter)
    print(f"rank {dist.get_rank()} agrees", flush=True)
    dist.barrier()
    os._exit(0)  # the check is done, and gloo's teardown aborts or hangs now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
