"""The cost of a step on GPUs, on paper: nothing here was measured on one.

The step as the code is runs under ``FakeTensorMode`` on ``cuda``: operation by operation its FLOPs, the bytes it reads and writes, and one launch. A roofline
turns them into time: an operation takes the longest of its arithmetic, its memory traffic and the least time of a kernel; the host launches one after the other;
a step takes the longer of the two. *Compiled* fuses chains of pointwise operations, which then read and write only what enters and leaves the chain.

Assumptions are in :data:`GPUS`. Left out: optimizer, data loader, and whatever overlaps worse than perfectly. ``exact`` is ``Trainer``'s step; ``lgp`` is the mean
over a cycle of 32 steps, one of which measures. Needs g++, for the device guard of ``tests/device``.

    python benchmarks/paper_cost.py --vit vit-base-16 --batch 8 16 32 64 128
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "device"))
if "torch" not in sys.modules:
    import guard  # noqa: F401  # it has to come first
import simulated
import torch
import torch.nn.functional as F
from common import RESULTS, VITS, build_vit, write_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import hf_lgp.call
from hf_lgp.attention_interface import intercepted_attention
from hf_lgp.control.controller import MEASURE_EVERY
from hf_lgp.control.plan import GROUPS as MEASURED
from hf_lgp.control.plan import StepPlan, identity_order
from hf_lgp.estimator import control_weights
from hf_lgp.methods import RowWalk, row_walk
from hf_lgp.rows import groups as row_groups
from hf_lgp.rows.walk import RowBudget


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU."""

    half_tflops: float  # peak of tensor cores
    efficiency: float  # share of it that products reach
    attention: float  # share of that which attention reaches
    float_tflops: float  # peak of float32, of which six tenths are reached
    gigabytes: float  # per second, of which eight tenths are reached
    launch_us: float  # of the host, per launch
    least_us: float  # of a kernel
    dtype: str  # of autocast


GPUS = {
    "T4": Gpu(65, 0.45, 0.5, 8.1, 320, 10, 3.0, "fp16"),
    "L4": Gpu(121, 0.50, 1.0, 30.3, 300, 8, 2.0, "bf16"),
    "A10G": Gpu(70, 0.70, 1.0, 31.2, 600, 8, 2.0, "bf16"),
    "A100": Gpu(312, 0.60, 1.0, 19.5, 1555, 8, 2.0, "bf16"),
    "4090": Gpu(165, 0.70, 1.0, 82.6, 1008, 6, 2.0, "bf16"),
    "H100": Gpu(989, 0.60, 1.0, 67.0, 3350, 6, 2.0, "bf16"),
}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}

NO_KERNEL = simulated.NO_KERNEL | {"detach_", "requires_grad_"}
WRITES_ONLY = {
    *("zero_", "fill_", "zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones", "full", "full_like"),
    *("arange", "scalar_tensor"),
}


@dataclass(frozen=True)
class Op:
    """One operation, or a fused chain of them."""

    phase: str
    name: str
    kind: str  # "product", "attention" or "other"
    half: bool
    flops: float
    reads: tuple[tuple[int, int], ...]  # storage and bytes
    writes: tuple[tuple[int, int], ...]
    launches: int = 1

    @property
    def bytes(self) -> int:
        return sum(n for _, n in (*self.reads, *self.writes))

    def microseconds(self, gpu: Gpu) -> float:
        """Time on a GPU that is never idle."""
        peak = gpu.half_tflops * gpu.efficiency if self.half else 0.6 * gpu.float_tflops
        peak *= gpu.attention if self.kind == "attention" else 1.0
        memory = self.bytes / (0.8e3 * gpu.gigabytes)
        return max(self.flops / (1e6 * peak), memory, gpu.least_us * self.launches)


def _size(t: Tensor) -> int:
    """Bytes, rows that are repeated by a stride of zero counted once."""
    entries = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        entries *= length if stride else 1
    return entries * t.element_size()


class Trace(TorchDispatchMode):
    """Notes every operation on the device, and the peak of what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.phase = "rest"
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        self._names: dict[int, int] = {}
        self._numbers = count()

    def _storage(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._known or self._known[key]() is None:
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[key] = weakref.ref(storage, lambda _: self._gone(size))
            self._names[key] = next(self._numbers)  # an address is used again
        return self._names[key]

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.device.type == "cuda" for t in (*ins, *outs)):
            return out
        written = {self._storage(t): _size(t) for t in outs}
        if getattr(func, "is_view", False) or name in NO_KERNEL or func._schema.name.startswith("prim::"):
            return out
        read = {self._storage(t): _size(t) for t in (() if name in WRITES_ONLY else ins)}
        packet, flops, kind = func.overloadpacket, 0.0, "other"
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            kind = "attention" if "attention" in name else "product"
        half = any(t.dtype in HALF.values() for t in (*outs, *ins)) and kind != "other"
        self.ops.append(Op(self.phase, name, kind, half, flops, tuple(read.items()), tuple(written.items())))
        return out


def fused(ops: list[Op]) -> list[Op]:
    """Chains of pointwise operations of one phase as one kernel each, two where they are long: as a compiler would have them."""
    last_read = {storage: i for i, op in enumerate(ops) for storage, _ in op.reads}
    result: list[Op] = []
    chain: list[int] = []

    def close() -> None:
        if not chain:
            return
        made: set[int] = set()
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for i in chain:
            reads |= {storage: size for storage, size in ops[i].reads if storage not in made}
            made |= {storage for storage, _ in ops[i].writes}
            writes |= dict(ops[i].writes)
        kept = {s: n for s, n in writes.items() if last_read.get(s, chain[-1] + 1) > chain[-1]}
        first = ops[chain[0]]
        merged = replace(first, reads=tuple(reads.items()), writes=tuple(kept.items()), launches=min(2, len(chain)))
        result.append(merged)
        chain.clear()

    for i, op in enumerate(ops):
        if op.kind != "other" or (chain and ops[chain[-1]].phase != op.phase):
            close()
        if op.kind == "other":
            chain.append(i)
        else:
            result.append(op)
    close()
    return result


@dataclass(frozen=True)
class Cost:
    """A step on one GPU."""

    host_ms: float
    device_ms: float
    launches: int

    @property
    def ms(self) -> float:
        return max(self.host_ms, self.device_ms)


def cost(ops: list[Op], gpu: Gpu) -> Cost:
    launches = sum(op.launches for op in ops)
    return Cost(launches * gpu.launch_us / 1e3, sum(op.microseconds(gpu) for op in ops) / 1e3, launches)


# -- the step ----------------------------------------------------------------------------------------------------------


def _attention(dtype: str) -> Callable[..., Tensor]:
    """Flash attention in bf16, the memory-efficient kernel in fp16, which Turing has."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        assert attn_mask is None
        scale = kwargs.get("scale")
        if dtype == "bf16":
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False, False, scale=scale)[0]
        graph = torch.is_grad_enabled() and q.requires_grad
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, graph, dropout_p, False, scale=scale)[0]

    return attend


@contextlib.contextmanager
def phases(trace: Trace) -> Iterator[None]:
    """A context in which the walk is told apart from the rest of a step."""
    before = hf_lgp.call.walk

    def walk(*args: Any, **kwargs: Any) -> Any:
        steps = before(*args, **kwargs)
        while True:
            outer, trace.phase = trace.phase, "walk"
            step = next(steps, None)
            trace.phase = outer
            if step is None:
                return
            yield step

    hf_lgp.call.walk = walk
    try:
        yield
    finally:
        hf_lgp.call.walk = before


def ops_of(model: Any, method: RowWalk, plan: StepPlan, batch: int, side: int, dtype: str) -> tuple[list[Op], int]:
    """Operations of a step, and its peak memory in bytes beyond the parameters."""
    pixels = torch.empty(batch, 3, side, side, device="cuda")
    labels = torch.empty(batch, dtype=torch.long, device="cuda")
    for parameter in model.parameters():
        parameter.grad = None
    trace = Trace()
    with trace, phases(trace), method.splice(plan, lambda _: None):
        with torch.autocast("cuda", HALF[dtype]):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return trace.ops, trace.peak - weights


def steps_of(vit: str, batches: list[int], fraction: float, budget: RowBudget) -> dict[str, Any]:
    """Operations and memory of every kind of step, by precision and batch."""
    model, side = build_vit(vit, labels=1000, attn_implementation="sdpa"), VITS[vit]["image_size"]
    few = {"pixel_values": torch.randn(4, 3, side, side), "labels": torch.arange(4)}

    def loss(examples: int) -> Tensor:
        return model(**{name: value[:examples] for name, value in few.items()}).loss

    method = row_walk(model, loss, 4, budget, intercepted_attention, False)
    plans = {
        "exact": StepPlan(),
        "exact, last block on one row": StepPlan(first_row=True),
        "predicted": StepPlan(fraction, first_row=True, seed=1),
        "measuring": StepPlan(fraction, measure=MEASURED, first_row=True, seed=1),
    }
    for cached in (control_weights, identity_order, row_groups._patterns, row_groups._alone):
        cached.cache_clear()
    steps: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        simulated.moved(model.train(), lambda t: torch.empty_like(t, device="cuda"))
        for dtype in sorted({gpu.dtype for gpu in GPUS.values()}):
            F.scaled_dot_product_attention = _attention(dtype)
            for batch in batches:
                for kind, plan in plans.items():
                    steps[dtype, batch, kind] = ops_of(model, method, plan, batch, side, dtype)
                print(f"traced {dtype}, batch {batch}", flush=True)
    return steps


def figures(steps: dict[str, Any], gpu: Gpu, batch: int) -> dict[str, Any]:
    """Times and ratios on one GPU at one batch size, eager and compiled."""
    result: dict[str, Any] = {}
    for way, form in (("eager", lambda ops: ops), ("compiled", fused)):
        of = {kind: cost(form(steps[gpu.dtype, batch, kind][0]), gpu) for kind in ("exact", "predicted", "measuring")}
        mean = ((MEASURE_EVERY - 1) * of["predicted"].ms + of["measuring"].ms) / MEASURE_EVERY
        result[way] = {
            "exact_ms": of["exact"].ms,
            "exact_is_launch_bound": of["exact"].host_ms > of["exact"].device_ms,
            "lgp": mean / of["exact"].ms,
            "predicted": of["predicted"].ms / of["exact"].ms,
            "measuring": of["measuring"].ms / of["exact"].ms,
        }
    exact, predicted = (steps[gpu.dtype, batch, kind][1] for kind in ("exact", "predicted"))
    return {**result, "peak_memory": predicted / exact}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit", choices=list(VITS), default="vit-base-16")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--single-rows", type=int, default=2)
    parser.add_argument("--name")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    simulated.believed()
    steps = steps_of(options.vit, options.batch, options.fraction, RowBudget(options.groups, options.single_rows))
    kinds = dict.fromkeys(kind for _, _, kind in steps)
    launches = {kind: len(steps["bf16", options.batch[0], kind][0]) for kind in kinds}
    print("launches, eager:", ", ".join(f"{kind} {number:,}" for kind, number in launches.items()))
    table = {name: {batch: figures(steps, gpu, batch) for batch in options.batch} for name, gpu in GPUS.items()}
    for name, rows in table.items():
        eager, compiled = (
            "  ".join(f"{batch}: {row[way]['lgp']:.2f}" for batch, row in rows.items()) for way in ("eager", "compiled")
        )
        print(f"{name:5} of an eager exact step  {eager}   both compiled  {compiled}")
    settings = {name: getattr(options, name) for name in ("vit", "fraction", "groups", "single_rows")}
    assumed = {name: asdict(gpu) for name, gpu in GPUS.items()}
    result = {"on paper": True, "settings": settings, "assumed": assumed, "launches": launches, "gpus": table}
    write_json(options.output / f"{options.name or f'paper_cost_{options.vit}'}.json", result)


if __name__ == "__main__":
    main()
