"""Models that cannot be predicted: an automatic run is Trainer's and says why, a fixed fraction is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Build, Gradients, arguments, assert_exact_with_one_warning, assert_unbiased, losses
from tiny import TinyImages, tiny_convnext, tiny_vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, ViTForImageClassification

from hf_lgp import LGPTrainer
from hf_lgp.call import Call
from hf_lgp.control.controller import Controller
from hf_lgp.methods import RowWalk
from hf_lgp.sealed import SpliceError

DATA = TinyImages(32, dtype=torch.float32)


def hidden_states_read(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    class Deep(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs, output_hidden_states=True)
            return outputs.loss + sum(h.square().mean() for h in outputs.hidden_states[1:-1])

    return Deep(tiny_vit(torch.float32, num_hidden_layers=3), args, train_dataset=DATA, **options)


def convolutions(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    return base(tiny_convnext(), args, train_dataset=DATA, **options)


class Meeting(nn.Module):
    """A part of a block whose examples see one another."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, rows: Tensor) -> Any:
        return self.part(rows + rows.mean(0))


class InPairs(nn.Module):
    """A model whose blocks let the examples of a batch see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(torch.float32, num_hidden_layers=3)
        self.vit.vit.layers[1].mlp = Meeting(self.vit.vit.layers[1].mlp)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        return self.vit(pixel_values=pixel_values, labels=labels)


def coupled(base: type[Trainer], args: Any, **options: Any) -> Trainer:
    return base(InPairs(), args, train_dataset=DATA, **options)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (hidden_states_read, "is read elsewhere"),
        (convolutions, "calls attention neither by"),
        (coupled, "do not treat examples independently"),
    ],
)
def test_it_is_trained_exactly(build: Build, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_exact_with_one_warning(build, tmp_path, caplog, reason)


def predicting_soon(fraction: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run that predicts, by a fixed fraction or because the automatic choice says so after eight steps."""
    if fraction == 0.0:
        monkeypatch.setattr(Controller, "decided", lambda self, *_: replace(self, fraction=0.5 if self.seen else 1.0))
    return {"lgp_control_fraction": fraction, "lgp_exact_steps": 0, "max_steps": 12}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "hf_lgp" and r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.5, {"exact": 2, "predicted": 10}), (0.0, {"exact": 10, "predicted": 2})]
)
def test_what_breaks_after_the_check_is_trained_exactly_from_there(
    fraction: float,
    steps: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Changing(LGPTrainer):
        """A loss that reads hidden states from the eleventh step on."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            late = self.state.global_step >= 10
            outputs = model(**inputs, output_hidden_states=late)
            return outputs.loss + (outputs.hidden_states[1].square().mean() if late else 0.0)

    model = tiny_vit(torch.float32, num_hidden_layers=3)
    args = arguments(tmp_path, **predicting_soon(fraction, monkeypatch))
    trainer = Changing(model, args, train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == steps
    assert trainer.state.global_step == len(losses(trainer)) == 12
    (warning,) = warnings_of(caplog)
    assert "From step 10 on" in warning and "\n" not in warning
    assert not any("forward" in module.__dict__ for module in model.modules())


class Leaving(nn.ModuleList):
    """LayerDrop as encoders of speech have it: their loop leaves out a block at random."""

    def __iter__(self) -> Iterator[nn.Module]:
        return (block for block in super().__iter__() if not self.training or float(torch.rand(())) > 0.3)


class Skipping(nn.Module):
    """LayerDrop within a block, which then hands on what it got."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        left_out = self.training and float(torch.rand(())) < 0.3
        return hidden if left_out else self.block(hidden, *args, **kwargs)


DROPPING = {"in the loop": Leaving, "within blocks": lambda blocks: nn.ModuleList(map(Skipping, blocks))}


@pytest.mark.parametrize("how", DROPPING)
def test_blocks_left_out_at_random_are_seen_in_the_check(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_vit(torch.float32, num_hidden_layers=4)
    model.vit.layers = DROPPING[how](model.vit.layers)
    args = arguments(tmp_path, max_steps=4, lgp_control_fraction=0.0)
    trainer = LGPTrainer(model, args, train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 4, "predicted": 0}
    (warning,) = warnings_of(caplog)
    assert "trains this model exactly: " in warning
    assert not any("forward" in module.__dict__ for module in model.modules())
    fixed = arguments(tmp_path, max_steps=4, lgp_control_fraction=0.5)
    with pytest.raises(ValueError, match="cannot be predicted"):
        LGPTrainer(model, fixed, train_dataset=DATA).train()


class Aside(nn.Module):
    """A part of a block that in training leaves a loss of its own on itself."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.loss = part, 0.0

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.part(rows)
        if self.training:
            self.loss = out.square().mean()
        return out


class WithSideLoss(nn.Module):
    """A model that adds it to its loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.aside = model, Aside(model.vit.layers[1].mlp)
        model.vit.layers[1].mlp = self.aside
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        out = self.model(pixel_values=pixel_values, labels=labels)
        return {"loss": out.loss + (self.aside.loss if self.training else 0.0), "logits": out.logits}


def test_losses_that_appear_in_training_alone_are_seen_in_the_check(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = WithSideLoss(tiny_vit(torch.float32, num_hidden_layers=3))
    args = arguments(tmp_path, max_steps=3, lgp_control_fraction=0.0)
    trainer = LGPTrainer(model, args, train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps["predicted"] == 0 and "trains this model exactly: " in warnings_of(caplog)[0]
    assert model.calls == 3, "the check leaves buffers as they were"


@pytest.mark.parametrize("error", [SpliceError("it fails"), ValueError("it fails in another way")])
def test_a_step_that_fails_in_the_backward_is_taken_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(failing: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        class Watching(LGPTrainer):
            def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
                loss = super().training_step(model, *args, **kwargs)
                found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                return loss

        def pull(*_: Any) -> Any:
            raise error

        args = arguments(tmp_path, max_steps=1, lgp_control_fraction=0.5 if failing else 1.0)
        trainer = Watching(tiny_vit(torch.float32), args, train_dataset=DATA)
        with monkeypatch.context() as patched:
            begin = LGPTrainer._lgp_begin

            def then_fail(self: Any, *arguments: Any) -> None:
                begin(self, *arguments)
                patched.setattr(Call, "_pull", pull)

            patched.setattr(LGPTrainer, "_lgp_begin", then_fail)
            trainer.train()
        return found

    exact, after = gradients(False), gradients(True)
    assert all(torch.equal(exact[name], g) for name, g in after.items()) and exact.keys() == after.keys()


@pytest.mark.parametrize("predictor", ["auto", "linear"])
def test_who_begins_to_listen_in_a_block_is_told_of_all_examples(
    predictor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss that reads what its own hooks took, from the fourth step on, and keeps nothing of it."""

    class Listening(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            heard: list[Tensor] = []
            if self.state.global_step < 3:
                return model(**inputs).loss
            hook = model.vit.layers[0].mlp.fc1.register_forward_hook(lambda _, args, out: heard.append(out))
            loss = model(**inputs).loss
            hook.remove()
            assert len(heard) == 1 and len(heard[0]) == self.args.per_device_train_batch_size
            return loss + 0.1 * heard[0].mean()

    model = tiny_vit(torch.float32, num_hidden_layers=3)
    trainer = Listening(model, arguments(tmp_path, max_steps=6, lgp_predictor=predictor), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 3, "predicted": 3}
    (warning,) = warnings_of(caplog)
    assert "From step 3 on" in warning and "a hook in its blocks" in warning


def test_what_a_loss_begins_to_take_out_of_a_block_is_no_part_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A router that leaves a loss of its own on itself, which counts from the fourth step on; nobody keeps its graph."""

    class Routed(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part, self.router, self.loss = part, nn.Linear(8, 2), None

        def forward(self, rows: Tensor) -> Tensor:
            self.loss = self.router(rows).square().mean() if self.training else 0.0
            return self.part(rows)

    model = tiny_vit(torch.float32, num_hidden_layers=3)
    aside = model.vit.layers[1].layernorm_before = Routed(model.vit.layers[1].layernorm_before)

    class Later(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = model(**inputs).loss + (aside.loss if self.state.global_step >= 3 else 0.0)
            aside.loss = 0.0
            return loss

    trainer = Later(model, arguments(tmp_path, max_steps=6), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 3, "predicted": 3}
    (warning,) = warnings_of(caplog)
    assert "From step 3 on" in warning and "from inside its blocks" in warning


class Preempted(Exception):
    """A machine is taken away."""


@pytest.mark.parametrize("error", [Preempted, TimeoutError])
def test_what_has_nothing_to_do_with_predictions_ends_the_run(error: type[Exception], tmp_path: Path) -> None:
    class Stopped(LGPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3 and not raised:
                raised.append(1)
                raise error
            return super().compute_loss(*args, **kwargs)

    raised: list[int] = []
    trainer = Stopped(tiny_vit(torch.float32), arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(error):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_gradient_that_is_taken_in_the_middle_of_a_step_is_not_counted_twice(tmp_path: Path) -> None:
    """A loss that in the second micro-batch of a step calls ``backward`` has gradients of the head by then."""
    calls: list[int] = []

    class Auxiliary(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            out = model(**inputs)
            if self.state.global_step == 2 and model.classifier.weight.grad is not None:
                calls.append(1)
                out.logits.square().mean().backward(retain_graph=True)
            return out.loss

    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Auxiliary(tiny_vit(torch.float32), args, train_dataset=DATA)
    with pytest.raises(RuntimeError, match="could not be taken again: its loss is made of gradients"):
        trainer.train()
    assert calls == [1]


def test_gradients_of_parameters_that_the_optimizer_alone_knows_are_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a loss with parameters of its own."""
    scale = nn.Parameter(torch.ones(()))
    found: list[float] = []

    class Scaled(LGPTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.add_param_group({"params": [scale]})
            return optimizer

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return scale * model(**inputs).loss

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            scale.grad = None
            loss = super().training_step(*args, **kwargs)
            found.append(float(scale.grad) / float(loss))
            return loss

    def pull(*_: Any) -> Any:
        raise ValueError("it fails")

    trainer = Scaled(tiny_vit(torch.float32), arguments(tmp_path, max_steps=1), train_dataset=DATA)
    begin = trainer._lgp_begin
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_lgp_begin", lambda *a: (begin(*a), patched.setattr(Call, "_pull", pull)))
        trainer.train()
    assert found == [pytest.approx(1.0)] and trainer._lgp_steps["exact"] == 1


def test_memory_that_runs_out_in_a_step_that_only_predictions_need_is_no_end_of_an_automatic_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pull(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    trainer = LGPTrainer(
        tiny_vit(torch.float32), arguments(tmp_path, **predicting_soon(0.0, monkeypatch)), train_dataset=DATA
    )
    begin = trainer._lgp_begin
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_lgp_begin", lambda *a: (begin(*a), patched.setattr(Call, "_pull", pull)))
        trainer.train()
    assert trainer._lgp_steps == {"exact": 12, "predicted": 0}
    assert "out of memory" in warnings_of(caplog)[0]


def test_a_loss_that_is_no_number_on_few_examples_is_checked_with_all(tmp_path: Path) -> None:
    """Such as one that wants pairs of a class."""

    class Pairs(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = model(**inputs).loss
            return loss if len(inputs["labels"]) > 4 else loss * float("nan")

    trainer = Pairs(tiny_vit(torch.float32), arguments(tmp_path), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 6}


class Towers(nn.Module):
    """Two models, of one of which hidden states are read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (tiny_vit(torch.float32, num_hidden_layers=3) for _ in range(2))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        read = self.one(pixel_values=pixel_values, labels=labels, output_hidden_states=True)
        return {"loss": read.loss + read.hidden_states[-2].mean() + self.other(pixel_values, labels).loss}


def test_of_several_stacks_those_are_predicted_that_can_be(tmp_path: Path) -> None:
    model = Towers()
    trainer = LGPTrainer(model, arguments(tmp_path), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 6} and trainer._lgp is not None
    (stack,) = trainer._lgp.method.stacks
    assert stack.parts[0].block is model.other.vit.layers[0]


def test_a_stack_that_couples_examples_does_not_keep_others_from_predictions(tmp_path: Path) -> None:
    model = Towers()
    model.one.vit.layers[0].mlp.norm = nn.BatchNorm1d(8)
    trainer = LGPTrainer(model, arguments(tmp_path), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp is not None and len(trainer._lgp.method.stacks) == 1


def test_processes_compare_which_stacks_they_found() -> None:
    stacks = [SimpleNamespace(first_row_only=flag) for flag in (False, True)]
    found = [RowWalk(tuple(stacks[k] for k in which), None, which).found for which in ((0,), (1,), (0, 1))]  # type: ignore[arg-type, misc]
    assert found == [1.0, 6.0, 7.0]


def test_a_weight_that_is_pruned_later_is_pruned_in_the_last_block_too(tmp_path: Path) -> None:
    """The last block is run on one row in exact steps, its keys and values from the weights that its layers have by then."""

    def pruned(base: type[Trainer]) -> list[float]:
        class Pruning(base):  # type: ignore[misc, valid-type]
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                if self.state.global_step == 3:
                    value.weight_mask[::2] = 0.0
                return super().training_step(*args, **kwargs)

        model = tiny_vit(torch.float32)
        value = model.vit.layers[-1].attention.v_proj
        prune.identity(value, "weight")
        args = arguments(tmp_path, base, lgp_control_fraction=0.0, lgp_exact_steps=12, max_steps=12)
        trainer = Pruning(model, args, train_dataset=DATA)
        trainer.train()
        return losses(trainer)

    assert pruned(LGPTrainer) == pytest.approx(pruned(Trainer), rel=1e-4)


@pytest.mark.parametrize("predictor", ["auto", "linear"])
def test_a_loss_that_begins_to_be_made_of_gradients_is_trained_exactly_from_there(
    predictor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adversary that is let loose after three steps would be told estimates."""

    class Adversarial(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            weight = model.vit.layers[0].mlp.fc1.weight
            loss = model(**inputs).loss
            if self.state.global_step >= 3:
                (slope,) = torch.autograd.grad(loss, weight, retain_graph=True)
                loss = loss + slope.sign().mean()
            return loss

    settings = {"max_steps": 6, "lgp_predictor": predictor, "lgp_window": 16}
    trainer = Adversarial(tiny_vit(torch.float32), arguments(tmp_path, **settings), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps["exact"] >= 3 and "From step 3 on" in warnings_of(caplog)[0]


def test_a_trunk_that_is_run_again_in_the_backward_is_trained_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the linear predictor, too, which goes without the check."""

    class Checkpointed(ViTForImageClassification):
        def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
            rows = checkpoint(self.vit, pixel_values, use_reentrant=False).last_hidden_state
            logits = self.classifier(rows[:, 0])
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = tiny_vit(torch.float32)
    model.__class__ = Checkpointed
    trainer = LGPTrainer(model, arguments(tmp_path, max_steps=3, lgp_predictor="linear"), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 3, "predicted": 0}
    assert "run once more in the backward" in warnings_of(caplog)[0]


def test_errors_of_the_users_own_code_are_raised_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(LGPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyError("mine")
            return super().compute_loss(*args, **kwargs)

    trainer = Failing(tiny_vit(torch.float32), arguments(tmp_path, max_steps=6), train_dataset=DATA)
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert not warnings_of(caplog)


class Stateful(nn.Module):
    """A model whose training forward changes what its next one reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("spread", torch.ones(1).expand(3))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        out = self.model(pixel_values=pixel_values, labels=labels)
        loss = out.loss * float(self.scale)
        if self.training:
            self.scale *= 1.5
        return {"loss": loss, "logits": out.logits}


def test_models_that_change_in_training_are_predicted_and_left_as_they_were(tmp_path: Path) -> None:
    model = Stateful(tiny_vit(torch.float32))
    trainer = LGPTrainer(model, arguments(tmp_path, max_steps=3, lgp_control_fraction=0.5), train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 3} and model.scale == pytest.approx(1.5**3)


def test_losses_with_a_random_stream_of_their_own_are_predicted(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)

    class Weighted(LGPTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            scale = 1.0 + torch.rand((), generator=stream) * model.training
            return super().compute_loss(model, inputs, **kwargs) * scale

    args = arguments(tmp_path, max_steps=3, lgp_control_fraction=0.5)
    trainer = Weighted(tiny_vit(torch.float32), args, train_dataset=DATA)
    trainer.train()
    assert trainer._lgp_steps["predicted"] == 3


def first_gradients(base: type[Trainer], loss: Any, folder: Path, **settings: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """A run of three steps with some ``compute_loss``, and the gradients of the first."""
    seen = Gradients()
    kind = type("Own", (base,), {"compute_loss": loss})
    args = arguments(folder, base, max_steps=3, max_grad_norm=0.0, lgp_exact_steps=0, **settings)
    trainer = kind(tiny_vit(torch.float32), args, train_dataset=DATA, callbacks=[seen])
    trainer.train()
    return trainer, seen.steps[0]


def backward_of_its_own(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    self.accelerator.backward(model(**inputs).loss)
    return model(**inputs).loss


def in_place(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    inputs["pixel_values"].mul_(0.5)
    return model(**inputs).loss


def logged(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    self.log({"mine": 1.0})
    return model(**inputs).loss


@pytest.mark.parametrize("loss", [backward_of_its_own, in_place, logged])
def test_the_check_leaves_gradients_batches_and_logs_as_they_were(loss: Any, tmp_path: Path) -> None:
    plain, expected = first_gradients(Trainer, loss, tmp_path)
    mine, found = first_gradients(LGPTrainer, loss, tmp_path, lgp_control_fraction=0.0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert [e.get("mine") for e in mine.state.log_history] == [e.get("mine") for e in plain.state.log_history]
    assert mine._lgp_steps["exact"] + mine._lgp_steps["predicted"] == 3


NAMES = {"images": "pixel_values", "classes": "labels"}


@pytest.mark.parametrize("arrays", [False, True])
def test_inputs_are_prepared_once(arrays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
        class Scaled(base):  # type: ignore[misc, valid-type]
            def _prepare_inputs(self, inputs: Any) -> Any:
                out = super()._prepare_inputs({name: torch.as_tensor(value) for name, value in inputs.items()})
                return {"pixel_values": 0.5 * out["images"], "labels": out["classes"]}

        def lists(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
            batch = {name: torch.stack([row[of] for row in rows]) for name, of in NAMES.items()}
            return {name: value.numpy() for name, value in batch.items()} if arrays else batch

        return Scaled(tiny_vit(), args, train_dataset=TinyImages(4), data_collator=lists, **options)

    assert_unbiased(build, tmp_path, monkeypatch)


def test_examples_are_counted_as_they_are_prepared(tmp_path: Path) -> None:
    """Batches of rows, each a batch of one by itself, that are put together late."""

    class Late(LGPTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            columns = {name: torch.cat([row[name] for row in inputs["rows"]]) for name in ("pixel_values", "labels")}
            return super()._prepare_inputs(columns)

    def rows(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {"rows": [{name: value[None] for name, value in row.items()} for row in batch]}

    trainer = Late(tiny_vit(torch.float32), arguments(tmp_path), train_dataset=DATA, data_collator=rows)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 0, "predicted": 6}
    assert trainer._lgp is not None and trainer._lgp.examples == {"exact": 24, "predicted": 24}


def test_a_step_that_fails_is_taken_again_with_all_that_its_batch_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of which only a half is left when they are prepared."""
    sizes: list[int] = []

    class Half(LGPTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return {name: value[: len(value) // 2] for name, value in super()._prepare_inputs(inputs).items()}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(inputs["labels"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def pull(*_: Any) -> Any:
        raise ValueError("it fails")

    trainer = Half(tiny_vit(torch.float32), arguments(tmp_path, max_steps=1), train_dataset=DATA)
    begin = trainer._lgp_begin
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_lgp_begin", lambda *a: (begin(*a), patched.setattr(Call, "_pull", pull)))
        trainer.train()
    assert sizes[-2:] == [4, 4] and trainer._lgp_steps["exact"] == 1


@pytest.mark.parametrize("refused", [False, True])
def test_what_preparing_inputs_draws_is_drawn_once(refused: bool, tmp_path: Path) -> None:
    def run(base: type[Trainer]) -> Trainer:
        class Noisy(base):  # type: ignore[misc, valid-type]
            def _prepare_inputs(self, inputs: Any) -> Any:
                out = super()._prepare_inputs(inputs)
                return {**out, "pixel_values": out["pixel_values"] + torch.randn_like(out["pixel_values"])}

        model = tiny_convnext() if refused else tiny_vit(torch.float32)
        trainer = Noisy(model, arguments(tmp_path, base, max_steps=3, lgp_control_fraction=0.0), train_dataset=DATA)
        trainer.train()
        return trainer

    plain, mine = run(Trainer), run(LGPTrainer)
    assert losses(mine) == (losses(plain) if refused else pytest.approx(losses(plain), rel=1e-5))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_loss_that_writes_into_its_batch_is_repeated_on_what_it_was(
    scale: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Writing(LGPTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
            with torch.inference_mode():
                inputs["teacher"] = torch.ones(len(inputs["labels"]))
            self.seen = inputs["pixel_values"].clone()
            loss = super().training_step(model, inputs, *args)
            self.wrote = inputs["pixel_values"]
            return loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            weight = (inputs.pop("teacher") / 2).mean()
            inputs["pixel_values"].mul_(scale)
            late = self.state.global_step >= 2
            outputs = model(**inputs, output_hidden_states=late)
            self.met = inputs["pixel_values"].clone()
            return weight * (outputs.loss + (outputs.hidden_states[1].square().mean() if late else 0.0))

    trainer = Writing(
        tiny_vit(torch.float32, num_hidden_layers=3), arguments(tmp_path, max_steps=3), train_dataset=DATA
    )
    trainer.train()
    assert trainer._lgp_steps == {"exact": 1, "predicted": 2} and "From step 2 on" in warnings_of(caplog)[0]
    assert torch.equal(trainer.met, scale * trainer.seen)


def test_losses_of_pairs_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
        class Pairs(base):  # type: ignore[misc, valid-type]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                one, other = model(**inputs).logits.unflatten(0, (-1, 2)).unbind(1)
                return (one - other).square().sum(1).mean()

        return Pairs(tiny_vit(), args, train_dataset=TinyImages(4), **options)

    assert_unbiased(build, tmp_path, monkeypatch)


def test_the_linear_predictor_knows_of_cached_weights_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Cached(LGPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with parametrize.cached():
                return super().compute_loss(*args, **kwargs)

    trainer = Cached(
        tiny_vit(torch.float32), arguments(tmp_path, max_steps=3, lgp_predictor="linear"), train_dataset=DATA
    )
    trainer.train()
    assert trainer._lgp_steps["predicted"] == 0 and "parametrize.cached" in warnings_of(caplog)[0]


def test_weights_that_are_cached_between_streams_are_trained_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(base: type[Trainer], args: Any, **options: Any) -> Trainer:
        class Cached(base):  # type: ignore[misc, valid-type]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                with parametrize.cached():
                    return model(**inputs).loss

        model = tiny_vit(torch.float32, num_hidden_layers=3)
        parametrizations.weight_norm(model.vit.layers[0].mlp.fc1)
        return Cached(model, args, train_dataset=DATA, **options)

    assert_exact_with_one_warning(build, tmp_path, caplog, "parametrize.cached")
