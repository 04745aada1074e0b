"""What happens when a training loop begins, and when it ends: one callback, as each costs time in every step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .report.figure import FIGURE_NAME, draw_history

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """Calls ``begin`` when a training loop begins, after a checkpoint was loaded; draws ``lgp.png`` into ``args.output_dir`` when it ends, on the world's main process.

    Without matplotlib, if nothing was predicted, or if the run saves nothing anyway, no figure appears. Without this callback, nothing is predicted.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin."""
        self._begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was logged; a figure that fails costs a warning, never the run."""
        saves = args.save_strategy != SaveStrategy.NO or args.push_to_hub
        if not (saves and state.is_world_process_zero) or args.output_dir is None:
            return
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            draw_history(state.log_history, os.path.join(args.output_dir, FIGURE_NAME))
        except Exception as error:
            logger.warning(f"No figure of this run could be drawn: {error}")
