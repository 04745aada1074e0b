"""What ``LGPTrainer`` adds to the model card that ``Trainer`` wrote: a section, tags, and results where there are none."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..settings import LGPSettings
from .card_section import section
from .figure import FIGURE_NAME

logger = logging.getLogger(__name__)

TAGS = ("lgp", "hf_lgp")

TASKS = {
    "ForImageClassification": ("image-classification", "Image Classification"),
    "ForSequenceClassification": ("text-classification", "Text Classification"),
}
"""How names of model classes end, and the task's type and name on the Hub."""

_START, _END = "<!-- hf_lgp: this section is generated -->", "<!-- hf_lgp: end of the generated section -->"
_SECTION = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)

_NO_BASE = "is a fine-tuned version of [](https://huggingface.co/) on"
"""What ``Trainer`` writes of a model whose config was not loaded from anywhere."""

_DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
"""What the Hub accepts as a data set's type."""

_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")


def extend_card(
    folder: str | os.PathLike[str],
    log_history: Sequence[Mapping[str, Any]],
    settings: LGPSettings,
    *,
    model_class: str = "",
    source: str | None = None,
    dataset: str | Sequence[str] | None = None,
) -> bool:
    """Add this package's section and metadata to ``README.md``, in place; what is there of an earlier call is replaced.

    A figure is linked if ``lgp.png`` lies beside the card. Results that ``Trainer`` put into the metadata stay; if it put none,
    which it does when task or data set are not named, those of the last evaluation are added.

    Raises:
        OSError: If the card cannot be written.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if not path.is_file():
        return False
    try:
        card = ModelCard.load(path)
    except Exception as error:  # metadata can be broken in many ways, and a run's end is no time to fail over one
        logger.warning(f"The model card in {folder} has no readable metadata and is left as it is: {error}")
        return False
    model_class = model_class or _class_in_config(folder)
    ending = next((ending for ending in TASKS if model_class.endswith(ending)), None)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.data.library_name = card.data.library_name or "transformers"
    if not card.data.eval_results:
        names = [dataset] if isinstance(dataset, str) else list(dataset or card.data.datasets or [])
        if ending and (results := evaluation_results(log_history, *TASKS[ending], names[0] if names else None)):
            card.data.model_name = card.data.model_name or folder.absolute().name
            card.data.eval_results = results
    text = section(
        log_history,
        settings,
        f"AutoModel{ending}" if ending else model_class or "AutoModel",
        source or folder.absolute().name,
        FIGURE_NAME if (folder / FIGURE_NAME).is_file() else None,
    )
    card.text = card.text.replace(_NO_BASE, "was trained from scratch on")
    block = f"{_START}\n\n{text}\n\n{_END}"
    if _SECTION.search(card.text):
        card.text = _SECTION.sub(lambda _: block, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{block}\n"
    card.save(path)
    return True


def evaluation_results(
    log_history: Sequence[Mapping[str, Any]], task: str, task_name: str, dataset: str | None
) -> list[EvalResult]:
    """Results for a card's metadata, of the last evaluation in a log; none if nothing was evaluated."""
    last: Mapping[str, Any] = next(
        (entry for entry in reversed(log_history) if any(key.startswith("eval_") for key in entry)), {}
    )
    metrics = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=dataset if dataset and _DATASET_TYPE.fullmatch(dataset) else "unknown",
            dataset_name=dataset or "unknown",
            metric_type=name,
            metric_name=" ".join(part.capitalize() for part in name.split("_")),  # as Trainer writes them
            metric_value=float(value),
        )
        for name, value in metrics.items()
        if not name.endswith(_NO_METRIC) and isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _class_in_config(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
