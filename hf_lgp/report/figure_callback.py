"""A callback that leaves a figure of the run in the output folder when training ends."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .figure import FIGURE_NAME, draw_history

logger = logging.getLogger(__name__)


class FigureCallback(TrainerCallback):
    """Draws ``lgp.png`` into ``args.output_dir`` at the end of training, on the world's main process.

    Without matplotlib, if nothing was predicted, or if the run saves nothing anyway, no figure appears.
    """

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
