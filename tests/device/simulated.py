"""A GPU that is not there: tensors that say ``cuda:0`` and hold CPU data, and a record of what would make the host wait for the device.

Every operation on such tensors passes :func:`_dispatch`, which runs it on the data and notes synchronisations, copies between devices and mixes of devices, each
with the line of the package that caused it. :func:`believed` changes torch for the whole process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("is_nonzero", "_linalg_check_errors", "bincount", "linalg_cholesky"),
}
"""Operations whose result the host has to see."""

NO_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "resize_", "set_", "is_pinned", "_fused_sdp_choice"),
}


@dataclass(frozen=True)
class Event:
    """Something that a step should not do."""

    kind: str  # "wait", "pageable copy" or "mixed devices"
    operation: str
    place: str  # file and line of the package, or of what it called


SEEN: list[Event] = []
LAUNCHES = [0]
_PINNED: set[int] = set()  # addresses of host memory that a copy need not wait for


def _note(kind: str, operation: str) -> None:
    frame, place = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/hf_lgp/" in name:
            place = f"hf_lgp/{name.rsplit('/hf_lgp/', 1)[1]}:{frame.f_lineno}"
            break
        if place == "?" and "/torch/" not in name and not name.endswith("simulated.py"):
            place = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    SEEN.append(Event(kind, operation, place))


class OnCuda(torch.Tensor):
    """A tensor on the device that is not there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCuda:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        _note("wait", "tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        _note("wait", "numpy")
        return self.held.numpy()

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnCuda({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnCuda) else value


def _copies(name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> bool:
    """Note a copy between devices; gives whether its result is on the device."""
    source = args[0] if name == "_to_copy" else args[1]
    if name == "_to_copy":
        to_cuda = isinstance(source, OnCuda) if wanted is None else wanted.type == "cuda"
        free = bool(kwargs.get("non_blocking", False))
    else:
        to_cuda = isinstance(args[0], OnCuda)
        free = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
    if to_cuda and not isinstance(source, OnCuda) and source.dim() > 0:
        if not free:
            _note("wait", f"{name} to the device, blocking")
        elif source.untyped_storage().data_ptr() not in _PINNED:
            _note("pageable copy", name)
    if isinstance(source, OnCuda) and not to_cuda and not free:
        _note("wait", f"{name} from the device, blocking")
    return to_cuda


def _pin(source: Tensor, device: Any = None) -> Tensor:
    if isinstance(source, OnCuda):
        raise RuntimeError("cannot pin a tensor on the device")
    copy = source.clone()
    _PINNED.add(copy.untyped_storage().data_ptr())
    return copy


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[-1]
    if name == "_fused_sdp_choice":
        return 0
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_cuda = any(isinstance(x, OnCuda) for x in tensors)
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    result_on_cuda = on_cuda if wanted is None else wanted.type == "cuda"
    if name in ("_to_copy", "copy_"):
        result_on_cuda = _copies(name, args, kwargs, wanted)
    elif on_cuda and any(not isinstance(x, OnCuda) and x.dim() > 0 for x in tensors):
        _note("mixed devices", name)
    if on_cuda and name in WAITS:
        _note("wait", name)
    if on_cuda and name in ("index", "index_put_", "index_put", "_unsafe_index"):
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            _note("wait", f"{name} with a mask")
    if result_on_cuda and not (getattr(func, "is_view", False) or name in NO_KERNEL):
        LAUNCHES[0] += 1
    own = tree_map(_held, kwargs)
    if wanted is not None:
        own["device"] = CPU
    own.pop("pin_memory", None)
    given = tree_map(_held, args)
    if name == "native_layer_norm" and len({t.dtype for t in given if isinstance(t, Tensor)}) > 1:  # a CPU mixes them
        raise RuntimeError("expected all tensors of a layer norm to have one dtype")
    if name == "_softmax" and given[2]:  # in float32 of half precision, which a CPU does not know
        given = given[0].float(), given[1], False
    out = func(*given, **own)
    if kwargs.get("pin_memory"):
        _PINNED.add(out.untyped_storage().data_ptr())
    arguments = func._schema.arguments
    written = [a for a, s in zip(args, arguments, strict=False) if s.alias_info is not None and s.alias_info.is_write]
    written += [
        kwargs[s.name] for s in arguments if s.name in kwargs and s.alias_info is not None and s.alias_info.is_write
    ]
    returns = func._schema.returns
    if written:
        if not returns:
            return None
        if len(returns) == len(written) and all(r.alias_info is not None for r in returns):
            return written[0] if len(written) == 1 else tuple(written)
    if not result_on_cuda:
        return out
    return tree_map(lambda x: OnCuda(x) if isinstance(x, Tensor) and not isinstance(x, OnCuda) else x, out)


class Simulated(TorchDispatchMode):
    """A context in which new tensors land on the device when they are asked to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Mark:
    """Stands for ``torch.cuda.Event``; its time is the number of launches before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = 0

    def record(self, *args: Any) -> None:
        self.at = LAUNCHES[0]

    def synchronize(self) -> None:
        """Waits only if the host is not far ahead: what was launched a hundred operations ago has long passed."""
        if LAUNCHES[0] - self.at < 100:
            _note("wait", "event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Mark) -> float:
        return float(other.at - self.at)


def believed() -> None:
    """Make torch believe in the device, for the whole process; ``guard`` was imported before torch."""
    changes: dict[Any, dict[str, Callable[..., Any]]] = {
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_bf16_supported": lambda *a, **k: True,
            "manual_seed": lambda seed: None,
            "get_rng_state": lambda *a: _saved("get_rng_state"),
            "set_rng_state": lambda *a, **k: _saved("set_rng_state"),
            "current_device": lambda: 0,
            "synchronize": lambda *a: _note("wait", "cuda.synchronize"),
            "Event": Mark,
        },
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
        # Rows that may only be read in part hold values, which a wrapper cannot do once more: a check of its own sees to them.
        torch.Tensor: {"pin_memory": _pin, "as_subclass": _as_subclass},
    }
    for owner, names in changes.items():
        for name, value in names.items():
            setattr(owner, name, value)
    torch._C._set_only_lift_cpu_tensors(True)


_usual_as_subclass = torch.Tensor.as_subclass


def _as_subclass(tensor: Tensor, kind: type[Tensor]) -> Tensor:
    return tensor if isinstance(tensor, (OnCuda, FakeTensor)) else _usual_as_subclass(tensor, kind)


def _saved(name: str) -> Tensor:
    _note("wait", name)
    return torch.zeros(16, dtype=torch.uint8)


def moved(model: nn.Module, place: Callable[[Tensor], Tensor] = lambda t: OnCuda(t.detach().clone())) -> nn.Module:
    """The model with its parameters and buffers where ``place`` puts them: by default on the device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(place(p), requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = place(b)
    return model
