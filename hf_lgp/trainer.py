"""``LGPTrainer``: ``transformers.Trainer`` with predicted gradients. Only overrides; the loop stays Trainer's."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils.dataclasses import DynamoBackend
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer

from .attention_interface import intercepted_attention
from .batches import changed, entries_of, examples_of, few_of, versions_of
from .compatibility import refuse_incompatible
from .control.exchange import holds_everywhere
from .methods import LinearMethod, Method, row_walk
from .renamed_weights import restore_renamed_weights
from .report.log_lines import library_logger, postfix, summary
from .report.model_card import extend_card
from .rows.compiled import Compiled
from .rows.leaves import Run, run_eagerly
from .rows.parts import NothingTrained, UnknownBlock
from .rows.walk import RowBudget
from .run_callback import RunCallback
from .sealed import SpliceError
from .session import Session
from .settings import LGPSettings
from .splice import no_gradient_taken
from .state_files import read_state, write_state
from .verify import evaluating, out_of_memory, unchanged, unrandom, without_gradients

logger = library_logger()

_CHECKED = 4  # examples that the check of a model takes
# What running a model in parts may raise; others, such as that a machine is taken away, are nobody's fault.
_CAUSED = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


class LGPTrainer(Trainer):
    """``Trainer`` that gives most examples of every micro-batch a forward pass only.

    The model is called once with the whole batch. A random control subset goes through its stack of blocks with a graph, all others
    without; the gradients of those are predicted, and the control subset removes the predictions' bias (arXiv 2511.05187). The expected
    gradient is that of ``Trainer`` for any loss, also one that couples examples; with ``lgp_control_fraction=1`` every step is ``Trainer``'s, bit for bit.

    Takes the arguments of ``Trainer``. ``args`` may be ``LGPTrainingArguments`` or plain ``TrainingArguments``, for which
    the defaults of the former apply.

    Raises:
        ValueError: If a setting is out of range, if model or arguments rule predictions out, or, at the first step, if a fixed
            fraction or a predictor was asked for that the model cannot have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lgp_settings = LGPSettings()
        self._lgp: Session | None = None
        self._lgp_cost = 1.0
        self._lgp_loading: str | None = None
        self._lgp_exhausted = False  # whether memory ran out in the check of the model: it may be worth a smaller batch
        self._lgp_writes = True  # whether losses may change their batch in place
        self._lgp_told = True  # whether batches have as many examples as when they are prepared
        self._lgp_restored: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(RunCallback(self._lgp_begin_run))
        self._lgp_validate()

    def _lgp_validate(self) -> None:
        self._lgp_settings = LGPSettings.from_arguments(self.args)
        if self._lgp_settings.control_fraction < 1.0:
            refuse_incompatible(self.args, self.model, self.accelerator)

    @property
    def _lgp_model(self) -> nn.Module:
        """The model outside of any wrapper."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def _lgp_compiles(self) -> bool:
        """Whether the model is compiled, be it that the launcher asks for it."""
        return self.args.torch_compile or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    @property
    def _lgp_steps(self) -> dict[str, int]:
        return {"exact": 0, "predicted": 0} if self._lgp is None else self._lgp.steps

    def _lgp_count(self, inputs: Any) -> int:
        """Number of examples; where they are made a batch only by ``_prepare_inputs``, that of the one that was checked."""
        return examples_of(inputs) if self._lgp_told or self._lgp is None else self._lgp.controller.size

    def _lgp_begin_run(self) -> None:
        """Every training loop passes here: of a search, of a second run, with a smaller batch."""
        self._lgp_validate()  # searches change arguments without constructing them anew
        settings, restored = self._lgp_settings, self._lgp_restored
        self._lgp, self._lgp_restored, self._lgp_writes, self._lgp_told = None, None, True, True
        if settings.control_fraction >= 1.0:
            return
        steps = self.state.max_steps * self.args.gradient_accumulation_steps
        fresh = partial(Session, settings, steps, self.args.device, self.args.process_index)
        self._lgp = fresh()
        if restored is not None:
            try:
                self._lgp.load_state_dict(*restored)
            except (KeyError, TypeError, ValueError) as error:
                restored = None
                logger.warning(f"The checkpoint's LGP state is of another version ({error!r}): it is measured anew.")
        if self.args.world_size > 1 and not holds_everywhere(restored is not None, self.args.device):
            self._lgp = fresh()  # some nodes may not have the checkpoint's folder

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch by the plan of the moment.

        Args and result are those of ``Trainer.training_step``; the loss is that of the whole micro-batch.
        """
        session, self._lgp_cost = self._lgp, 1.0
        if session is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if session.rests():
            loss = super().training_step(model, inputs, num_items_in_batch)
            session.rested(self.state.global_step, self._lgp_count(inputs))
            return loss
        if session.method is None:
            trained = sum(p.requires_grad for p in self._lgp_model.parameters())
            if session.unchecked(trained):
                with unrandom():
                    batch = self._prepare_inputs(few_of(inputs, examples_of(inputs)))
                if holds_everywhere(examples_of(batch) >= 2, self.args.device):  # all processes check at the same time
                    self._lgp_told = examples_of(batch) == examples_of(inputs)
                    self._lgp_begin(session, batch, num_items_in_batch, trained)
        skipped = self.accelerator.optimizer_step_was_skipped
        plan = session.plan(self.state.global_step, self.args.gradient_accumulation_steps, skipped)
        examples, size, spliced = self._lgp_count(inputs), entries_of(inputs), session.splices(plan)
        before, kept = versions_of(inputs), None
        if spliced and self._lgp_writes:
            kept = few_of(inputs, examples_of(inputs))  # all of them
        # Compiled code would not see the splice.
        eager = torch.compiler.set_stance("force_eager") if self._lgp_compiles and spliced else nullcontext()
        failed: str | None = None
        try:
            with eager, session.step(plan, examples, float(size)):
                loss = super().training_step(model, inputs, num_items_in_batch)
        except _CAUSED as error:  # also another than foreseen: then an exact step goes well
            foreseen, memory = isinstance(error, SpliceError), out_of_memory(error)
            if not spliced or (memory and (self._lgp_settings.demanded or self.args.auto_find_batch_size)):
                raise
            failed = f"{error}" if foreseen else f"running it in parts raises {type(error).__name__}: {error}"
            begun = not isinstance(error, SpliceError) or error.in_backward
            midway = begun and not session.first_of_step  # of an accumulated step
            lost = kept is None and changed(before, inputs)
            if self.args.world_size > 1 or lost or midway:  # other processes would wait for this one
                if not foreseen:
                    raise
                raise RuntimeError(
                    f"Predictions failed where the step could not be taken again: {failed}. Use `lgp_control_fraction=1` to train exactly."
                ) from error
        if failed is not None:  # the error would keep what the step held
            session.refuse(failed)
            if session.first_of_step:  # the backward may have begun
                groups = [] if self.optimizer is None else self.optimizer.param_groups
                of_optimizer = (p for group in groups for p in group["params"])
                for p in (*model.parameters(), *of_optimizer):
                    p.grad = None
            inputs = inputs if kept is None else kept
            loss = LGPTrainer.training_step(self, model, inputs, num_items_in_batch)  # not a subclass's once more
            logger.warning(f"From step {self.state.global_step} on, LGPTrainer trains this model exactly: {failed}.")
            return loss
        self._lgp_writes = changed(before, inputs) if spliced else self._lgp_writes
        # A forward pass is a third of a step by operation count.
        self._lgp_cost = plan.fraction + (1.0 - plan.fraction) / 3.0
        return loss

    def compute_loss_context_manager(self) -> ExitStack:
        """The context in which ``compute_loss`` is called; what it makes must not be made of gradients, of which it would be given estimates."""
        contexts = super().compute_loss_context_manager()
        if self._lgp is not None:
            contexts.enter_context(no_gradient_taken())
        return contexts

    def _lgp_begin(self, session: Session, batch: Any, num_items_in_batch: Tensor | int | None, trained: int) -> None:
        """Find and verify a way to predict the model's gradients; nothing else is different afterwards."""
        settings, model = self._lgp_settings, self._lgp_model

        def loss(count: int) -> Tensor:
            with self.compute_loss_context_manager():
                result = self.compute_loss(model, few_of(batch, count), num_items_in_batch=num_items_in_batch)
            return result[0] if isinstance(result, tuple) else result

        def works(count: int) -> bool:
            try:
                with torch.no_grad(), unrandom(), evaluating(model):
                    return bool(loss(count).isfinite().all())
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                return False

        method: Method | None = None
        reason: str | None = None
        needed = True
        # A launcher may set it up, too.
        half = self.accelerator.mixed_precision != "no" or any(p.dtype.itemsize < 4 for p in model.parameters())
        try:
            if settings.predictor == "linear":
                method = LinearMethod(model, settings)
            else:
                examples = examples_of(batch)
                # Some losses want a whole batch.
                budget = RowBudget(*settings.rows)
                args, launched = self.args, self.accelerator.state.dynamo_plugin
                backend = args.torch_compile_backend or launched.backend.value.lower()
                mode = args.torch_compile_mode or launched.mode
                run: Run = Compiled(backend, mode) if self._lgp_compiles else run_eagerly
                with unchanged(model), without_gradients(model), patch.object(self, "log", lambda *_, **__: None):
                    count = _CHECKED if examples > _CHECKED and works(_CHECKED) else examples
                    method = row_walk(model, loss, count, budget, intercepted_attention, half, run)
        except UnknownBlock as error:
            reason, needed = str(error), not isinstance(error, NothingTrained)
        except Exception as error:
            if self.args.auto_find_batch_size or not should_reduce_batch_size(error):
                raise
            reason, self._lgp_exhausted = "memory ran out in its check", True
        if (reason := session.use(method, reason, trained, examples_of(batch))) is None:
            return
        if settings.demanded and needed:
            raise ValueError(
                f"The gradients of this model cannot be predicted: {reason}. Use `lgp_control_fraction=1` to train exactly, or leave "
                "`lgp_control_fraction` and `lgp_predictor` at their defaults, which do that by themselves."
            )
        logger.warning(f"LGPTrainer trains this model exactly: {reason}.")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the step just taken: examples with predicted gradients have hardly any backward pass."""
        return int(super().floating_point_ops(inputs) * self._lgp_cost)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer`` does, with ``lgp/*`` readings beside every training loss, and a line that sums them up at the end."""
        session, ended = self._lgp, "train_runtime" in logs
        if session is not None and ("loss" in logs or ended):
            figures, shares = session.figures(), session.shares() if ended else {}
            # Trackers group what is logged by the part of its name before the slash.
            logs.update({f"lgp/{name}": value for name, value in (figures | shares).items()})
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix_str(postfix(figures), refresh=False)
            if ended and self.is_world_process_zero():
                logger.info(summary(shares, logs["train_runtime"], session.saved, session.reason))
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card as ``Trainer`` does, with a section on what predicted gradients did in this run."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self.args.output_dir is None:
            return
        try:
            model: Any = self._lgp_model
            adapted = model.get_base_model() if hasattr(model, "get_base_model") else None  # as PEFT's models have it
            extend_card(
                self.args.output_dir,
                self.state.log_history,
                self._lgp_settings,
                model_class=type(model if adapted is None else adapted).__name__,
                source=self.hub_model_id,
                base=None if adapted is None else getattr(getattr(adapted, "config", None), "_name_or_path", ""),
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
        folder, tied = self._lgp_loading, getattr(self.model, "all_tied_weights_keys", {})  # these have other names
        skipped = [name for name in load_result.missing_keys if name not in tied]
        if not (skipped and folder is not None and restore_renamed_weights(self.model, folder, skipped)):
            super()._issue_warnings_after_load(load_result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._lgp is not None:
            state = self._lgp.state_dict()  # of all processes together
            if self.args.should_save:
                write_state(output_dir, *state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or getattr(self.args, "lgp_control_fraction", 0.0) >= 1.0:
            return
        try:
            self._lgp_restored = read_state(checkpoint)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning(f"No LGP state in {checkpoint} ({error}): what was measured is measured anew.")
