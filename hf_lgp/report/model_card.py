"""What ``LGPTrainer`` adds to the model card that ``Trainer`` wrote: a section and tags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..settings import LGPSettings
from .card_section import section
from .figure import FIGURE_NAME

TAGS = ("lgp", "hf_lgp")

_ENDINGS = ("ForImageClassification", "ForSequenceClassification")
"""How names of model classes end that have an ``AutoModel`` of their own."""

_START, _END = "<!-- hf_lgp: this section is generated -->", "<!-- hf_lgp: end of the generated section -->"
_SECTION = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)

_NO_BASE = "is a fine-tuned version of [](https://huggingface.co/) on"
"""What ``Trainer`` writes of a model whose config was not loaded from anywhere."""


def extend_card(
    folder: str | os.PathLike[str],
    log_history: Sequence[Mapping[str, Any]],
    settings: LGPSettings,
    *,
    model_class: str = "",
    source: str | None = None,
    base: str | None = None,
) -> bool:
    """Add this package's section and metadata to ``README.md``, in place; what is there of an earlier call is replaced.

    A figure is linked if ``lgp.png`` lies beside the card. Of an adapter, ``model_class`` and ``base`` are the class and name of the model that it is for.

    Raises:
        OSError, ValueError, yaml.YAMLError: If the card cannot be read or written.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if not path.is_file():
        return False
    card = ModelCard.load(path)
    ending = next((ending for ending in _ENDINGS if model_class.endswith(ending)), None)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.data.library_name = card.data.library_name or "transformers"
    text = section(
        log_history,
        settings,
        f"AutoModel{ending}" if ending else model_class or "AutoModel",
        source or folder.absolute().name,
        FIGURE_NAME if (folder / FIGURE_NAME).is_file() else None,
        base,
    )
    card.text = card.text.replace(_NO_BASE, "was trained from scratch on")
    block = f"{_START}\n\n{text}\n\n{_END}"
    replaced, count = _SECTION.subn(lambda _: block, card.text)
    card.text = replaced if count else f"{card.text.rstrip()}\n\n{block}\n"
    card.save(path)
    return True
