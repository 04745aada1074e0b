"""``LGPTrainer``: ``transformers.Trainer`` with predicted gradients. Only overrides; the loop stays Trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .batches import batch_size, contributing, entries, first_label, part_of
from .compatibility import refuse_incompatible
from .costs import PART
from .draws import draw_control, private_randomness, private_seed
from .engine import LGPEngine
from .old_estimator import relative_cost
from .exhaustion import is_exhaustion
from .figure_callback import FigureCallback
from .head import find_head, named_head
from .ledger import readings, summary
from .model_card import extend_card
from .renamed_weights import restore_renamed_weights
from .settings import LGPSettings
from .state_files import StateFileError, read_state, write_state

logger = logging.get_logger(__name__)

_FORWARD_SHARE = 1.0 / 3.0
"""A forward pass in units of a forward and backward pass, by operation count."""


class LGPTrainer(Trainer):
    """``Trainer`` that gives most examples of every micro-batch a forward pass only.

    A random control subset of every micro-batch gets exact gradients; the rest get gradients that are predicted by a linear map
    from last-layer quantities, and the control subset removes the predictions' bias (arXiv 2511.05187). The expected
    gradient is that of ``Trainer``; with ``lgp_control_fraction=1`` every step is ``Trainer``'s, bit for bit.

    Takes the arguments of ``Trainer``. ``args`` may be :class:`~hf_lgp.LGPTrainingArguments` or plain ``TrainingArguments``, for which
    the defaults of the former apply.

    The losses of the examples may be combined in any way (means, ``num_items_in_batch``, class weights, label smoothing, a
    ``compute_loss_func`` or an overridden ``compute_loss``) as long as they depend on the model through its logits.

    Raises:
        ValueError: If a setting is out of range, or model or arguments rule predictions out.
        HeadNotFoundError: At the first step, if no unique linear head produces the logits.
        SpliceBypassedError: At a step with predictions, if ``compute_loss`` did not run the model on its inputs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lgp_settings = LGPSettings()
        self._lgp_engine: LGPEngine | None = None
        self._lgp_restored: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._lgp_micro_batch = (-1, 0)
        self._lgp_steps = {"exact": 0, "predicted": 0}
        self._lgp_cost = 1.0
        self._lgp_nonfinite_seen = 0.0
        self._lgp_loading: str | None = None
        self._lgp_exhausted = False
        super().__init__(*args, **kwargs)
        self.add_callback(FigureCallback)
        self._lgp_validate()

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as ``Trainer.train`` does, with the same arguments and result; hooks are gone from the model afterwards."""
        self._lgp_validate()
        self._lgp_steps = {"exact": 0, "predicted": 0}
        self._lgp_exhausted, self._lgp_nonfinite_seen = False, 0.0
        try:
            return super().train(*args, **kwargs)
        finally:
            self._lgp_close()

    def _lgp_validate(self) -> None:
        # Searches change arguments without constructing them anew, so every training run validates again.
        self._lgp_settings = LGPSettings.from_arguments(self.args)
        if self._lgp_settings.control_fraction < 1.0:
            refuse_incompatible(self.args, self.model)

    def _lgp_close(self) -> None:
        if self._lgp_engine is not None:
            self._lgp_engine.close()
        self._lgp_engine = None
        self._lgp_restored = None

    @property
    def _lgp_model(self) -> nn.Module:
        """The model outside of any wrapper: passes on it touch neither gradients nor their reduction."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _lgp_build(self, inputs: dict[str, Any]) -> LGPEngine:
        settings, unwrapped = self._lgp_settings, self._lgp_model
        examples = batch_size(inputs)
        assert examples is not None
        few = part_of(inputs, torch.arange(2, device=self.args.device), examples, without=self.label_names)

        def seeded() -> AbstractContextManager[Any]:
            return private_randomness(self.args.device, settings.seed)

        def probe() -> Any:
            with torch.no_grad(), seeded():
                return unwrapped(**few)

        if settings.head:
            name, head = settings.head, named_head(unwrapped, settings.head, probe)
        else:
            name, head = find_head(unwrapped, probe)
        engine = LGPEngine(unwrapped, head, settings, self.args.device, apart=self.args.torch_compile)
        training = unwrapped.training
        unwrapped.eval()  # two runs that are compared must not draw different dropout
        try:
            with self.accelerator.autocast():
                engine.verify_backbone(few, probe, 2)
                unwrapped.train()
                engine.verify_shortcut(few, probe, seeded)
                if engine.apart:
                    # transformers notes the kind of problem in the config at the first loss: before code is compiled that reads it.
                    with torch.no_grad(), seeded():
                        self.compute_loss(
                            unwrapped, part_of(inputs, torch.arange(2, device=self.args.device), examples)
                        )
        except BaseException:
            engine.close()
            raise
        finally:
            unwrapped.train(training)
        logger.info(
            f"Predicting gradients below the head `{name}`: {len(engine.rules)} tensors with a rule cover "
            f"{engine.coverage:.2%} of the trunk's trainable parameters; "
            + (
                "the class-token path is followed."
                if engine.path is not None
                else "no class-token path, regression alone."
            )
        )
        if clipped := engine.clipped_ranks():
            logger.info(
                f"`lgp_rank={settings.rank}` exceeds the width of {clipped} tensors and is clipped to it there."
            )
        if self._lgp_restored is not None:
            try:
                engine.load_state_dict(*self._lgp_restored)
                self._lgp_nonfinite_seen = float(self._lgp_restored[0]["nonfinite"])
            except (ValueError, KeyError, TypeError) as error:
                logger.warning(f"The checkpoint's LGP state does not fit ({error}): the predictor starts afresh.")
            self._lgp_restored = None
        return engine

    # -- a training step -----------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: exact while the predictor is not ready, with predicted gradients afterwards.

        Args and result are those of ``Trainer.training_step``; the loss is that of the whole micro-batch.
        """
        self._lgp_cost = 1.0
        if self._lgp_settings.control_fraction >= 1.0:
            return super().training_step(model, inputs, num_items_in_batch)
        waiting = self._lgp_engine
        if waiting is not None and (waiting.wait() if self._lgp_waits else waiting.rest()):
            self._lgp_steps["exact"] += 1
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        examples, labels = batch_size(inputs), first_label(inputs, self.label_names)
        if examples is None or labels is None:
            logger.warning_once(
                "Batches that are not a flat dict of tensors with a label are trained on exactly. If yours has labels under "
                f"other names than {self.label_names}, pass them as `label_names`."
            )
        usable = examples is not None and examples >= 2 and labels is not None and not self._lgp_exhausted
        if usable and self._lgp_engine is None:
            with self._lgp_sparing_memory():
                self._lgp_engine = self._lgp_build(inputs)
        engine = self._lgp_engine
        if not usable or engine is None or self._lgp_waits:
            if engine is not None:
                engine.wait()
            self._lgp_steps["exact"] += 1
            return super().training_step(model, inputs, num_items_in_batch)
        assert examples is not None
        seed = self._lgp_seed()
        engine.begin(examples, entries(inputs))
        if engine.rehearsing:
            self._lgp_rehearse(model, inputs, examples, seed)
            if self._lgp_exhausted:
                self._lgp_steps["exact"] += 1
                return super().training_step(model, inputs, num_items_in_batch)
        controls = engine.controls(examples)
        if controls == examples:
            self._lgp_steps["exact"] += 1
            with nullcontext() if engine.apart else engine.exact(examples, seed):
                loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._lgp_predicted_step(model, inputs, num_items_in_batch, examples, controls, seed)
        with self._lgp_sparing_memory():
            if engine.apart and engine.observer.watching and not self._lgp_exhausted:
                self._lgp_observe(inputs, examples, seed)
            if not self._lgp_exhausted:
                engine.finish()
        return loss

    @property
    def _lgp_waits(self) -> bool:
        """Whether it is too early for an automatic choice."""
        settings, state = self._lgp_settings, self.state
        return settings.automatic and state.global_step < settings.exact_steps_of(state.max_steps)

    @contextmanager
    def _lgp_sparing_memory(self) -> Iterator[None]:
        """Train exactly from here on if memory runs out inside, where nothing but the predictor can be lost."""
        try:
            yield
        except Exception as error:
            if not is_exhaustion(error):
                raise
            hint = "Lower `lgp_window` or `lgp_rank` to make the predictor smaller."
            if self.args.world_size > 1:  # the other processes would wait for this one
                raise RuntimeError(f"The gradient predictor ran out of memory. {hint}") from error
            logger.warning(f"The gradient predictor ran out of memory: training goes on exactly. {hint} ({error})")
            self._lgp_exhausted = True
            self._lgp_close()

    def _lgp_rehearse(self, model: nn.Module, inputs: dict[str, Any], examples: int, seed: int) -> None:
        """Time predictions before anything is learnt for them."""
        assert self._lgp_engine is not None
        model.train()
        for count in (examples, examples // PART):
            if count == 0 or self._lgp_exhausted or self._lgp_engine.review.rehearsed_in_vain:
                return
            few = torch.arange(count, device=self.args.device)
            plain = part_of(inputs, few, examples, without=self.label_names)
            size = entries(inputs) * count // examples
            with self._lgp_sparing_memory(), private_randomness(self.args.device, seed), self.accelerator.autocast():
                self._lgp_engine.rehearse(plain, partial(self._lgp_model, **plain), count, size, count == examples)

    def _lgp_observe(self, inputs: dict[str, Any], examples: int, seed: int) -> None:
        """A small exact pass of the model as it is, not compiled, for the predictor to learn from; no gradient is kept."""
        engine, labels = self._lgp_engine, first_label(inputs, self.label_names)
        assert engine is not None and labels is not None
        count = min(examples, engine.observer.examples)
        order, _ = draw_control(examples, count, private_seed(seed, 1), contributing(labels))
        few = part_of(inputs, order[:count].to(self.args.device, non_blocking=True), examples)
        with private_randomness(self.args.device, seed), self.compute_loss_context_manager(), engine.exact(count, seed):
            loss = self.compute_loss(self._lgp_model, few)
            trainable = [parameter for parameter in self._lgp_model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trainable, allow_unused=True)

    def _lgp_predicted_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        examples: int,
        controls: int,
        seed: int,
    ) -> Tensor:
        engine = self._lgp_engine
        assert engine is not None
        labels = first_label(inputs, self.label_names)
        assert labels is not None
        order, weight = draw_control(examples, controls, seed, contributing(labels))
        order = order.to(self.args.device, non_blocking=True)
        # What Trainer does at the start of its step has to precede the prediction pass as well.
        model.train()
        if callable(begin := getattr(self.optimizer, "train", None)):
            begin()
        start = 0 if engine.predicts_all else controls
        rest = part_of(inputs, order[start:], examples, without=self.label_names)
        with self._lgp_sparing_memory(), private_randomness(self.args.device, seed), self.accelerator.autocast():
            engine.predict(rest, lambda: self._lgp_model(**rest), examples, controls)
        if self._lgp_exhausted:
            self._lgp_steps["exact"] += 1
            return super().training_step(model, inputs, num_items_in_batch)
        self._lgp_steps["predicted"] += 1
        self._lgp_cost = relative_cost(controls / examples, _FORWARD_SHARE)
        # Labels stay whole: the spliced head returns logits of the whole micro-batch, so the loss is that of all examples.
        control = part_of(inputs, order[:controls], examples, keep=self.label_names)
        with engine.spliced(order, controls, weight):
            return super().training_step(model, control, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss as ``Trainer.compute_loss`` gives it; the scale its backward pass starts from is noted."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self._lgp_engine is not None and self._lgp_engine.observing and loss.requires_grad:
            loss.register_hook(self._lgp_engine.record_loss_scale)
        return result

    def _lgp_seed(self) -> int:
        """Seed of this micro-batch's draw: a function of where training stands, so nothing needs saving."""
        step, micro_batch = self.state.global_step, 0
        if self._lgp_micro_batch[0] == step:
            micro_batch = self._lgp_micro_batch[1] + 1
        self._lgp_micro_batch = (step, micro_batch)
        return private_seed(self._lgp_settings.seed, step, micro_batch, self.args.process_index)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the step just taken: prediction examples have no backward pass."""
        return int(super().floating_point_ops(inputs) * self._lgp_cost)

    # -- evaluation, logs and checkpoints --------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as ``Trainer`` does, which is no part of a training step's time."""
        self._lgp_stop_clock()
        return super().evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as ``Trainer`` does, which is no part of a training step's time."""
        self._lgp_stop_clock()
        super().save_model(*args, **kwargs)

    def _lgp_stop_clock(self) -> None:
        """What comes now is no part of a micro-batch, unless one is just computed: losses may log."""
        if self._lgp_engine is not None and not self._lgp_engine.stepping:
            self._lgp_engine.review.end()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with ``lgp_*`` readings beside every training loss and at the end, where a line sums them up."""
        ended = "train_runtime" in logs
        self._lgp_stop_clock()
        if self._lgp_engine is not None and ("loss" in logs or ended):
            if ended:
                self._lgp_engine.review.now()
            figures = readings(self._lgp_engine, self._lgp_steps)
            logs.update({f"lgp_{name}": value for name, value in figures.items()})
            if (fresh := figures["nonfinite"] - self._lgp_nonfinite_seen) > 0:
                logger.warning(
                    f"{int(fresh)} micro-batches had predictions that were not finite; these were left out of the gradient."
                )
                self._lgp_nonfinite_seen = figures["nonfinite"]
            if ended and self.is_world_process_zero():
                print(summary(figures, self._lgp_steps, logs["train_runtime"]))
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card as ``Trainer`` does, with a section on what predicted gradients did in this run."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self.args.output_dir is None:
            return
        try:
            extend_card(
                self.args.output_dir,
                self.state.log_history,
                self._lgp_settings,
                model_class=type(self._lgp_model).__name__,
                source=self.hub_model_id,
                dataset=kwargs.get("dataset"),
            )
        except Exception as error:  # a card is no reason to lose a push
            logger.warning(f"The model card says nothing of predicted gradients: {error}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._lgp_loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._lgp_loading = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        skipped, folder = bool(load_result.missing_keys), self._lgp_loading
        if not (skipped and folder is not None and restore_renamed_weights(self._lgp_model, folder)):
            super()._issue_warnings_after_load(load_result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._lgp_engine is None or not self.args.should_save:
            return
        tensors, counters = self._lgp_engine.state_dict()
        write_state(output_dir, tensors, {**counters, **{f"steps_{k}": v for k, v in self._lgp_steps.items()}})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._lgp_settings.control_fraction >= 1.0:
            return
        try:
            tensors, counters = read_state(checkpoint)
            self._lgp_steps = {name: counters.pop(f"steps_{name}") for name in self._lgp_steps}
        except (StateFileError, KeyError) as error:
            logger.warning(f"No usable LGP state in {checkpoint} ({error}): the predictor starts afresh.")
            return
        self._lgp_restored = tensors, counters
