"""What cannot be trained with predictions, said before training starts and with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils.dataclasses import DistributedType
from accelerate.utils.other import is_compiled_module
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

_INSTEAD = "Or train exactly with `lgp_control_fraction=1`."


def refuse_incompatible(
    args: TrainingArguments, model: nn.Module | None, accelerator: Accelerator | None = None
) -> None:
    """Raise if predictions cannot be used with these arguments, with this model, or with what the launcher has set up.

    Raises:
        ValueError: Naming the first obstacle and what to change.
    """
    of_model = () if model is None else _obstacles_in_model(model)
    for obstacle in (*_obstacles_in_arguments(args, accelerator), *of_model):
        raise ValueError(f"{obstacle} {_INSTEAD}")


def _obstacles_in_arguments(args: TrainingArguments, accelerator: Accelerator | None) -> Iterator[str]:
    launched = "" if accelerator is None else accelerator.distributed_type
    if args.n_gpu > 1:
        yield (
            "LGPTrainer does not work inside nn.DataParallel. Start it with `accelerate launch`, or show it one GPU with "
            "CUDA_VISIBLE_DEVICES."
        )
    if args.deepspeed or launched == DistributedType.DEEPSPEED:
        yield "LGPTrainer does not support DeepSpeed: use DistributedDataParallel."
    if args.fsdp or launched == DistributedType.FSDP:
        yield "LGPTrainer does not support FSDP: use DistributedDataParallel."
    if launched == DistributedType.MEGATRON_LM:
        yield "LGPTrainer does not support Megatron-LM: use DistributedDataParallel."
    if is_sagemaker_mp_enabled():
        yield "LGPTrainer does not support SageMaker's model parallelism: use DistributedDataParallel."
    for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        configured = (args.parallelism_config, getattr(accelerator, "parallelism_config", None))
        if any(getattr(config, f"{kind}_size", 1) > 1 for config in configured):
            yield (
                f"LGPTrainer does not support {name} parallelism, which spreads an example over processes: leave `{kind}_size` "
                "of `parallelism_config` at 1."
            )
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        yield (
            "LGPTrainer's processes decide together, so each needs as many batches as the others: leave "
            "`even_batches` of `accelerator_config` at True."
        )
    checkpointing = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    if (checkpointing or {}).get("use_reentrant"):
        yield "Reentrant activation checkpointing allows no gradient of a part: set its `use_reentrant` to False."
    if args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        yield f"{args.optim} applies gradients during the backward pass: choose another `optim`."


def _obstacles_in_model(model: nn.Module) -> Iterator[str]:
    if is_compiled_module(model) or getattr(model, "_compiled_call_impl", None) is not None:
        yield "LGPTrainer compiles the model itself: pass it as it is, with `torch_compile=True`."
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_quantized", False):
        yield "LGPTrainer does not support quantised weights: load the model unquantised."
    if (getattr(model, "tp_size", None) or 1) > 1:
        yield "LGPTrainer does not support tensor parallelism: load the model without a `tp_plan`."
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        yield "LGPTrainer needs the model on one device: load it without a `device_map` that spreads it."
