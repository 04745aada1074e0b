"""What cannot be trained with predictions, said before training starts and with what to do instead."""

from __future__ import annotations

from accelerate.utils import is_compiled_module
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

_INSTEAD = "Or train exactly with `lgp_control_fraction=1`."


def refuse_incompatible(args: TrainingArguments, model: nn.Module | None) -> None:
    """Raise if predictions cannot be used with these arguments or this model.

    Args:
        args: The training arguments.
        model: The model to train, or None when it is not built yet.

    Raises:
        ValueError: Naming the obstacle and what to change.
    """
    if args.n_gpu > 1:
        raise ValueError(
            "LGPTrainer does not work inside nn.DataParallel. Start it with `accelerate launch`, or show it one GPU with "
            f"CUDA_VISIBLE_DEVICES. {_INSTEAD}"
        )
    if args.deepspeed:
        raise ValueError(f"LGPTrainer does not support DeepSpeed: use DistributedDataParallel. {_INSTEAD}")
    if args.fsdp:
        raise ValueError(f"LGPTrainer does not support FSDP: use DistributedDataParallel. {_INSTEAD}")
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise ValueError(
            "LGPTrainer's processes share what they observe, so each needs as many examples as the others: leave "
            f"`even_batches` of `accelerator_config` at True. {_INSTEAD}"
        )
    if args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        raise ValueError(f"{args.optim} applies gradients during the backward pass: choose another `optim`. {_INSTEAD}")
    if model is None:
        return
    if is_compiled_module(model):
        raise ValueError(
            f"LGPTrainer compiles the model itself: pass it as it is, with `torch_compile=True`. {_INSTEAD}"
        )
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"LGPTrainer does not support quantised weights: load the model unquantised. {_INSTEAD}")
    coupled = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if coupled:
        raise ValueError(
            f"{coupled[0]} is a BatchNorm layer: in training mode it couples the examples of a batch, so a gradient of some of "
            f"them is not defined by themselves. Replace it by GroupNorm or LayerNorm. {_INSTEAD}"
        )
