"""What is refused at construction, with a message that says what to do; fraction 1 is never refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.dataclasses import DistributedType
from accelerate.utils.other import is_compiled_module
from tiny import TinyImages, tiny_vit
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import hf_lgp.compatibility
import hf_lgp.trainer
from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.compatibility import refuse_incompatible
from hf_lgp.rows.parts import UnknownBlock


def arguments(folder: Path, **settings: Any) -> LGPTrainingArguments:
    return LGPTrainingArguments(str(folder), use_cpu=True, report_to="none", save_strategy="no", **settings)


def arguments_with(folder: Path, **values: Any) -> LGPTrainingArguments:
    """Arguments as they would be on a machine or in a launch that is not at hand."""
    args = arguments(folder)
    args.distributed_state = SimpleNamespace(num_processes=values.pop("world_size", 1), distributed_type="NO")
    for name, value in values.items():
        setattr(args, name, value)
    return args


def resnet() -> nn.Module:
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def vit_with(**attributes: Any) -> nn.Module:
    model = tiny_vit(torch.float32)
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    return model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_n_gpu": 2}, "accelerate launch.*CUDA_VISIBLE_DEVICES"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed.*DistributedDataParallel"),
        ({"fsdp": "full_shard"}, "FSDP.*DistributedDataParallel"),
        ({"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)}, "tensor parallelism.*tp_size"),
        ({"parallelism_config": SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)}, "context parallelism.*cp_size"),
        ({"parallelism_config": SimpleNamespace(tp_size=1, cp_size=1, sp_size=2)}, "sequence parallelism.*sp_size"),
        ({"optim": "lomo"}, "lomo.*another `optim`"),
        ({"optim": "adalomo"}, "adalomo.*another `optim`"),
        ({"world_size": 2, "accelerator_config": SimpleNamespace(even_batches=False)}, "even_batches.*True"),
    ],
)
def test_arguments_that_rule_predictions_out(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{message}.*lgp_control_fraction=1"):
        refuse_incompatible(arguments_with(tmp_path, **values), None)


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ({"distributed_type": DistributedType.FSDP}, "FSDP"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron"),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1, sp_size=1, sp_backend=None)},
            "tensor parallelism",
        ),
    ],
)
def test_what_a_launcher_has_set_up_and_no_argument_says_is_refused(
    launched: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = LGPTrainer.create_accelerator_and_postprocess

    def postprocess(self: Any) -> None:
        create(self)
        kind = type("Launched", (type(self.accelerator),), launched)
        self.accelerator.__class__ = kind

    monkeypatch.setattr(LGPTrainer, "create_accelerator_and_postprocess", postprocess)
    with pytest.raises(ValueError, match=f"{message}.*lgp_control_fraction=1"):
        LGPTrainer(tiny_vit(torch.float32), arguments(tmp_path))


def test_model_parallelism_of_sagemaker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_lgp.compatibility, "is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"SageMaker.*lgp_control_fraction=1"):
        refuse_incompatible(arguments(tmp_path), None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: vit_with(quantization_method="bitsandbytes"), "quantised.*unquantised"),
        (lambda: vit_with(is_quantized=True), "quantised.*unquantised"),
        (lambda: vit_with(_tp_size=2), "tensor parallelism.*tp_plan"),
        (lambda: vit_with(hf_device_map={"vit": 0, "classifier": 1}), "one device.*device_map"),
    ],
)
def test_models_that_rule_predictions_out(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{message}.*lgp_control_fraction=1"):
        refuse_incompatible(arguments(tmp_path), model())


def test_a_trainer_refuses_at_construction_and_at_every_train(tmp_path: Path) -> None:
    data = TinyImages(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="spreads it"):
        LGPTrainer(vit_with(hf_device_map={"vit": 0, "classifier": 1}), arguments(tmp_path), train_dataset=data)
    trainer = LGPTrainer(tiny_vit(torch.float32), arguments(tmp_path), train_dataset=data)
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ValueError, match="use_reentrant"):
        trainer.train()


def test_a_batch_norm_within_blocks_couples_examples(tmp_path: Path) -> None:
    class OfRows(nn.BatchNorm1d):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(rows.transpose(1, 2)).transpose(1, 2)

    model = tiny_vit(torch.float32)
    model.vit.layers[0].layernorm_before = OfRows(8)
    settings = arguments(tmp_path, lgp_control_fraction=0.5, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"BatchNorm.*couples the examples.*lgp_control_fraction=1"):
        LGPTrainer(model, settings, train_dataset=TinyImages(8, dtype=torch.float32)).train()


def normalised(folder: Path) -> LGPTrainer:
    """A run of two steps of a model with a BatchNorm in its head."""
    model = tiny_vit(torch.float32)
    model.classifier = nn.Sequential(nn.BatchNorm1d(8), model.classifier)
    settings = arguments(folder, lgp_control_fraction=0.5, max_steps=2, disable_tqdm=True)
    trainer = LGPTrainer(model, settings, train_dataset=TinyImages(8, dtype=torch.float32))
    trainer.train()
    return trainer


def test_batch_norms_elsewhere_see_every_example(tmp_path: Path) -> None:
    """Behind the blocks there is ordinary autograd on the whole batch: nothing stands against predictions."""
    assert normalised(tmp_path)._lgp_steps == {"exact": 0, "predicted": 2}


def test_the_check_of_a_model_leaves_its_statistics_alone(tmp_path: Path) -> None:
    assert normalised(tmp_path).model.classifier[0].num_batches_tracked == 2


def test_fraction_one_trains_what_predictions_refuse(tmp_path: Path) -> None:
    settings = arguments(tmp_path, lgp_control_fraction=1.0, max_steps=2, disable_tqdm=True)
    LGPTrainer(resnet(), settings, train_dataset=TinyImages(8, dtype=torch.float32, labels=2)).train()


@pytest.mark.parametrize("asked", ["ACCELERATE_DYNAMO_BACKEND", None])
def test_a_launcher_may_ask_for_compilation(asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    if asked:
        monkeypatch.setenv(asked, "EAGER")
    backends: list[str] = []
    monkeypatch.setattr(hf_lgp.trainer, "Compiled", lambda backend, mode: backends.append(backend))
    data = TinyImages(8, dtype=torch.float32)
    trainer = LGPTrainer(tiny_vit(torch.float32), arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    assert trainer._lgp_compiles == bool(asked) and backends == ["eager"] * bool(asked)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_is_compiled_in_place_is_refused(tmp_path: Path) -> None:
    model = tiny_vit(torch.float32)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="torch_compile=True"):
        LGPTrainer(model, arguments(tmp_path))


@pytest.mark.parametrize("launched", [False, True])
def test_half_precision_that_a_launcher_asks_for_is_checked_as_such(
    launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[bool] = []
    AcceleratorState._reset_state(reset_partial_state=True)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    def walk(*args: Any) -> Any:
        halves.append(args[5])
        raise UnknownBlock("enough")

    monkeypatch.setattr(hf_lgp.trainer, "row_walk", walk)
    data = TinyImages(8, dtype=torch.float32)
    LGPTrainer(tiny_vit(torch.float32), arguments(tmp_path, max_steps=1), train_dataset=data).train()
    assert halves == [launched]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_already_compiled_model_is_refused(tmp_path: Path) -> None:
    model = torch.compile(tiny_vit(torch.float32), backend="eager")
    assert is_compiled_module(model)
    with pytest.raises(ValueError, match="torch_compile=True"):
        LGPTrainer(model, arguments(tmp_path))
