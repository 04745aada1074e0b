"""The model card's section and metadata, on cards as Trainer writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from test_figure import HISTORY
from tiny import tiny_vit
from transformers import Trainer, TrainingArguments

from hf_lgp import LGPTrainer, LGPTrainingArguments
from hf_lgp.report.model_card import extend_card, section
from hf_lgp.settings import LGPSettings

LAST = {"lgp/variance": 1.3, "lgp/step_time": 0.6, "lgp/seconds_saved": 100.0}
RUN: list[dict[str, Any]] = [
    *HISTORY[:4],
    {**HISTORY[4], **LAST},
    {"step": 40, "eval_loss": 1.1, "eval_accuracy": 0.75, "eval_runtime": 0.1, "eval_samples_per_second": 9.0},
]
SETTINGS = LGPSettings(control_fraction=0.25, window=600, kernel="linear")


def _trainer(folder: Path) -> Trainer:
    trainer = Trainer(tiny_vit(), TrainingArguments(str(folder), use_cpu=True, report_to="none"))
    trainer.state.log_history = [*RUN[:-1], {"step": 40, "train_runtime": 1.0}, RUN[-1]]
    return trainer


def _extended(folder: Path, dataset: Any = None, **given: Any) -> ModelCard:
    trainer = _trainer(folder)
    trainer.create_model_card(dataset=dataset, **given)
    kind = type(trainer.model).__name__
    assert extend_card(folder, trainer.state.log_history, SETTINGS, model_class=kind)
    return ModelCard.load(folder / "README.md")


def test_the_section_says_what_happened_in_the_run() -> None:
    text = section(RUN, SETTINGS, "AutoModelForImageClassification", "me/mine", "lgp.png")
    assert "- control fraction: 1 in 25%, 0.25 in 50%, 0.125 in 25% of the log's entries" in text
    assert "0.9 at the end, 0.85 on average" in text
    assert "time saved against plain training, as estimated while training: 0:01:40 (h:min:s)" in text
    assert (
        "- `lgp_control_fraction`: 0.25" in text and "- `lgp_window`: 600" in text and "- `lgp_kernel`: linear" in text
    )
    assert "`lgp_rank`" not in text, "only what differs from the defaults"
    assert 'AutoModelForImageClassification.from_pretrained("me/mine")' in text
    assert "2511.05187" in text and "@software{hf_lgp" in text and "](lgp.png)" in text


def test_a_run_without_readings_says_so() -> None:
    exact = section([], LGPSettings(control_fraction=1.0), "AutoModel", "me/mine", None)
    assert "every gradient was exact" in exact and "![" not in exact and "| steps" not in exact
    assert "no readings" in section([{"loss": 1.0, "step": 1}], SETTINGS, "AutoModel", "me/mine", None)


def test_a_run_whose_log_missed_its_predictions_does_not_deny_them() -> None:
    readings = [{"lgp/fraction": 1.0, "step": 10}, {"lgp/fraction": 1.0, "lgp/examples_predicted": 0.4, "step": 20}]
    assert "every gradient was exact" in section(readings[:1], LGPSettings(), "AutoModel", "me/mine", None)
    text = section(readings, LGPSettings(), "AutoModel", "me/mine", None)
    assert "every gradient was exact" not in text and "examples with predicted gradients: 40%" in text


def test_an_adapter_is_loaded_by_peft_onto_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_vit(torch.float32)
    model.config._name_or_path = "me/base"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainer = LGPTrainer(adapted, LGPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text("utf-8")
    assert 'AutoModelForImageClassification.from_pretrained("me/base")' in card
    assert f'PeftModel.from_pretrained(model, "{tmp_path.name}")' in card and "plain PEFT adapter" in card


def test_readings_may_be_missing_or_not_finite() -> None:
    entry = {"lgp/fraction": 0.5, "lgp/variance_explained": float("nan"), "lgp/seconds_saved": -2.0, "step": 3}
    text = section([entry], SETTINGS, "AutoModel", "me/mine", None)
    assert "control fraction: 0.5 in 100%" in text and "variance that predictions explain" not in text
    assert "time lost against plain training, as estimated while training: 0:00:02 (h:min:s)" in text


def test_results_that_trainer_found_stay(tmp_path: Path) -> None:
    card = _extended(tmp_path, dataset="Tiny Images", dataset_tags="me/tiny", dataset_args="plain")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_args) == ("accuracy", 0.75, "plain")
    assert (result.dataset_name, result.dataset_type, result.task_type) == (
        "Tiny Images",
        "me/tiny",
        "image-classification",
    )
    assert {"lgp", "hf_lgp", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "transformers" and card.data.datasets == ["me/tiny"]


def test_extending_twice_leaves_one_section_and_what_stands_around_it(tmp_path: Path) -> None:
    _extended(tmp_path)
    path = tmp_path / "README.md"
    once = path.read_text(encoding="utf-8")
    extend_card(tmp_path, RUN, SETTINGS, model_class="ViTForImageClassification")
    assert path.read_text(encoding="utf-8") == once
    path.write_text(once + "\nMy own words.\n", encoding="utf-8")
    (tmp_path / "lgp.png").touch()
    extend_card(tmp_path, RUN[:2], LGPSettings(rank=3), model_class="ViTForImageClassification")
    twice = path.read_text(encoding="utf-8")
    assert twice.count("## Linear gradient prediction") == 1 and twice.endswith("\n\nMy own words.\n")
    assert "`lgp_rank`: 3" in twice and "`lgp_window`" not in twice and "](lgp.png)" in twice


def test_a_model_from_scratch_is_not_called_fine_tuned(tmp_path: Path) -> None:
    _trainer(tmp_path).create_model_card()
    assert "fine-tuned version of []" in (tmp_path / "README.md").read_text("utf-8"), "no longer needed: remove it"
    assert "was trained from scratch on an unknown dataset" in _extended(tmp_path).text
    assert "is a fine-tuned version of [me/base]" in _extended(tmp_path, finetuned_from="me/base").text


def test_without_a_card_nothing_happens(tmp_path: Path) -> None:
    assert not extend_card(tmp_path, RUN, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_card_with_broken_metadata_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [\n---\n# Mine\n")
    with pytest.raises(yaml.YAMLError):  # a warning in a trainer
        extend_card(tmp_path, RUN, SETTINGS)
    assert path.read_text() == "---\ntags: [\n---\n# Mine\n"


def test_a_card_of_plain_text_gets_metadata(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    assert extend_card(tmp_path, RUN, SETTINGS, model_class="BertForSequenceClassification")
    metadata = metadata_load(path)
    assert metadata is not None and metadata["tags"] == ["lgp", "hf_lgp"]
    assert "AutoModelForSequenceClassification.from_pretrained" in path.read_text(encoding="utf-8")


def test_a_model_of_another_kind_gets_a_section_without_results(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    assert extend_card(tmp_path, RUN, SETTINGS, model_class="Mine")
    assert "model-index" not in (metadata_load(path) or {}) and "Mine.from_pretrained" in path.read_text("utf-8")
