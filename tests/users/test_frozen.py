"""Parts of a model that are not trained, or not yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_same_weights, assert_unbiased, losses
from tiny import TinyImages, tiny_vit
from transformers import Trainer, TrainerCallback

from hf_lgp import LGPTrainer

BLOCK = "vit.layers."


def trained_where(wanted: Callable[[str], bool]) -> Any:
    model = tiny_vit(num_hidden_layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return model


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(lambda name: not name.startswith(f"{BLOCK}0"), id="first block frozen"),
        pytest.param(lambda name: not name.startswith(f"{BLOCK}1"), id="a block in between frozen"),
        pytest.param(lambda name: not name.startswith(f"{BLOCK}2"), id="last block frozen"),
        pytest.param(lambda name: name.startswith(BLOCK), id="everything but the blocks frozen"),
        pytest.param(lambda name: "bias" in name, id="biases only"),
    ],
)
def test_the_gradient_of_what_is_trained_is_unbiased(
    wanted: Callable[[str], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
        return base(trained_where(wanted), args, train_dataset=TinyImages(4), **options)

    assert_unbiased(build, tmp_path, monkeypatch)


def only_the_head(name: str) -> bool:
    return name.startswith("classifier")


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_with_all_blocks_frozen_there_is_nothing_to_predict(
    fraction: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = []
    for base in (Trainer, LGPTrainer):
        args = arguments(tmp_path, base, lgp_control_fraction=fraction)
        trained.append(base(trained_where(only_the_head), args, train_dataset=TinyImages(32)))
        trained[-1].train()
    assert trained[1]._lgp_steps == {"exact": 6, "predicted": 0}
    assert_same_weights(trained[1].model, trained[0].model)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "hf_lgp" and r.levelname == "WARNING"]
    assert "nothing in its blocks is trained" in warning


class Setting(TrainerCallback):
    """Freezes or unfreezes all blocks after the third step, as gradual unfreezing does."""

    def __init__(self, trains: bool) -> None:
        self.trains = trains

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.vit.requires_grad_(self.trains)


@pytest.mark.parametrize(
    ("wanted", "exact"),
    [
        pytest.param(only_the_head, 3, id="from the head only"),
        pytest.param(lambda n: not n.startswith((f"{BLOCK}0", f"{BLOCK}1", "vit.embeddings")), 0, id="from above"),
    ],
)
def test_blocks_unfrozen_midway_are_trained_from_there(
    wanted: Callable[[str], bool], exact: int, tmp_path: Path
) -> None:
    model = trained_where(wanted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved: dict[int, set[str]] = {}

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state_dict = model.state_dict()
            moved[state.global_step] = {n for n, v in before.items() if not torch.equal(v, state_dict[n])}

    # The optimizer must know of what is trained later.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = LGPTrainer(
        model,
        arguments(tmp_path),
        train_dataset=TinyImages(64),
        optimizers=(optimizer, None),
        callbacks=[Watching(), Setting(True)],
    )
    trainer.train()
    assert trainer._lgp_steps == {"exact": exact, "predicted": 6 - exact}
    lower = {name for name in before if name.startswith((f"{BLOCK}0", f"{BLOCK}1"))}
    assert not lower & moved[3] and lower <= moved[4]
    assert all(torch.tensor(losses(trainer)).isfinite())


def test_blocks_frozen_midway_stay_as_they_are(tmp_path: Path) -> None:
    model = trained_where(lambda name: True)
    kept: dict[str, torch.Tensor] = {}

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                kept.update({name: value.clone() for name, value in model.vit.state_dict().items()})

    args = arguments(tmp_path, max_grad_norm=0.0, weight_decay=0.0)
    trainer = LGPTrainer(model, args, train_dataset=TinyImages(64), callbacks=[Setting(False), Watching()])
    head = model.classifier.weight.clone()
    trainer.train()
    assert sum(trainer._lgp_steps.values()) == 6 and not torch.equal(model.classifier.weight, head)
    assert all(torch.equal(value, kept[name]) for name, value in model.vit.state_dict().items())
