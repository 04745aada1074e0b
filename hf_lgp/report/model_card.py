"""What ``LGPTrainer`` adds to the model card that ``Trainer`` wrote: a section and tags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .._version import __version__
from ..settings import LGPSettings
from .figure import FIGURE_NAME, series

TAGS = ("lgp", "hf_lgp")

_ENDINGS = ("ForImageClassification", "ForSequenceClassification")
"""How names of model classes end that have an ``AutoModel`` of their own."""

_START, _END = "<!-- hf_lgp: this section is generated -->", "<!-- hf_lgp: end of the generated section -->"
_SECTION = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)

_NO_BASE = "is a fine-tuned version of [](https://huggingface.co/) on"
"""What ``Trainer`` writes of a model whose config was not loaded from anywhere."""

_INTRODUCTION = (
    f"Trained with `LGPTrainer` of hf_lgp {__version__}: `transformers.Trainer`, except that only a share of every "
    "micro-batch, the control fraction, gets exact gradients. The gradients of the other examples are predicted, and the "
    "exact ones correct the predictions, so the expected gradient is that of plain training "
    "([arXiv 2511.05187](https://arxiv.org/abs/2511.05187))."
)

BIBTEX = f"""\
@article{{ciosek2025linear,
  title         = {{Linear Gradient Prediction with Control Variates}},
  author        = {{Ciosek, Kamil and Felicioni, Nicol{{\\`o}} and {{Elenter Litwin}}, Juan}},
  year          = {{2025}},
  journal       = {{arXiv preprint arXiv:2511.05187}},
  eprint        = {{2511.05187}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/2511.05187}}
}}

@software{{hf_lgp,
  title   = {{hf\\_lgp: linear gradient prediction with control variates for transformers.Trainer}},
  author  = {{{{The hf\\_lgp contributors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}
"""


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


def section(
    log_history: Sequence[Mapping[str, Any]],
    settings: LGPSettings,
    model_class: str,
    source: str,
    figure: str | None,
    base: str | None = None,
) -> str:
    """Markdown of the whole section, from its heading on, without a line break at the end; ``base`` names the model that an adapter is for."""
    parts = ["## Linear gradient prediction", _INTRODUCTION]
    readings = [entry for entry in log_history if "lgp/fraction" in entry]
    if readings:
        parts.append(_summary(readings))
    elif settings.control_fraction == 1.0:
        parts.append("In this run every gradient was exact: the control fraction was 1.")
    else:
        parts.append("The log of this run holds no readings of predictions.")
    if figure is not None:
        parts.append(f"![Loss, control fraction and variance explained over the steps of the run]({figure})")
    parts += ["### Settings", _settings_list(settings), "### Loading"]
    if base is None:
        loading = f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("{source}")'
        parts.append(f"A plain transformers checkpoint; hf_lgp is not needed.\n\n```python\n{loading}\n```")
    else:
        loading = (
            f'model = {model_class}.from_pretrained("{base or "the base model"}")  # as it was given to the trainer'
        )
        loading += f'\nmodel = PeftModel.from_pretrained(model, "{source}")'
        imported = f"from peft import PeftModel\nfrom transformers import {model_class}"
        parts.append(f"A plain PEFT adapter; hf_lgp is not needed.\n\n```python\n{imported}\n\n{loading}\n```")
    parts += ["### Citation", f"```bibtex\n{BIBTEX}```"]
    return "\n\n".join(parts)


def _summary(readings: Sequence[Mapping[str, Any]]) -> str:
    fractions, predicted = (series(readings, f"lgp/{name}")[1] for name in ("fraction", "examples_predicted"))
    if set(fractions) == {1.0} and not predicted:
        return (
            "In this run every gradient was exact: predictions did not pay, were not possible for this model, or the run was too "
            "short to tell."
        )
    spans = [f"{f:.4g} in {fractions.count(f) / len(fractions):.0%}" for f in sorted(set(fractions), reverse=True)]
    lines = [f"control fraction: {', '.join(spans)} of the log's entries"]
    if predicted:
        lines.append(f"examples with predicted gradients: {predicted[-1]:.0%}")
    if explained := series(readings, "lgp/variance_explained")[1]:
        lines.append(
            "share of the gradient's variance that predictions explain: "
            f"{explained[-1]:.3g} at the end, {sum(explained) / len(explained):.3g} on average"
        )
    if saved := series(readings, "lgp/seconds_saved")[1]:
        verb = "saved" if saved[-1] >= 0 else "lost"
        lines.append(
            f"time {verb} against plain training, as estimated while training: {timedelta(seconds=round(abs(saved[-1])))} (h:min:s)"
        )
    return "\n".join(f"- {line}" for line in lines)


def _settings_list(settings: LGPSettings) -> str:
    shown = [
        f"- `lgp_{name}`: {value}{' (chosen while training)' if name == 'control_fraction' and value == 0 else ''}"
        for name, value in asdict(settings).items()
        if name == "control_fraction" or value != getattr(LGPSettings, name)
    ]
    return "\n".join([*shown, "", "All other `lgp_*` settings have their defaults."])
