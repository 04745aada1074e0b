"""The text example: its data paths and messages on tiny made data, and one run from the command line to a checkpoint."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import train_text
from shared import InputError
from train_text import DataArguments, ModelArguments, build_model, docstrings, load_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

SIZES = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --vocabulary 100 --max_length 16"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def made_file(path: Path, count: int = 60, text: str = "text") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([text, "label"])
        for index in range(count):
            kind = ("praise", "blame")[index % 2]
            rows.writerow([f"number {index} is {'a wonderful' if kind == 'praise' else 'an awful'} thing", kind])
    return path


def test_docstrings_are_prose_of_every_library_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_text, "_FILES", 25)
    rows = docstrings(("numpy", "transformers"), each=20)
    assert rows.features["label"].names == ["numpy", "transformers"]
    assert rows["label"] == [0] * 20 + [1] * 20 and len(set(rows["text"])) == 40
    assert not any("numpy" in text for text in rows["text"][:20])


def test_texts_labels_and_a_held_out_part_come_from_a_file(tmp_path: Path) -> None:
    arguments = DataArguments(train_file=str(made_file(tmp_path / "a.csv")), max_train_samples=30)
    train, held_out, names = load_texts(arguments)
    assert (len(train), len(held_out), names) == (30, 12, ["blame", "praise"])
    assert all(
        (label == 1) == ("wonderful" in text) for text, label in zip(train["text"], train["labels"], strict=True)
    )
    again = load_texts(arguments)
    assert again[1]["text"] == held_out["text"], "the same texts are held out every time"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_file": "nowhere.csv"}, "no such file"),
        ({"train_file": "a.csv", "dataset_name": "imdb"}, "keep one of them"),
        ({"validation_file": "a.csv"}, "needs --train_file"),
        ({"train_val_split": 1.0}, "between 0 and 1"),
        ({"train_file": "{}", "text_column_name": "label_id"}, "no such column"),
    ],
)
def test_messages(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = str(made_file(tmp_path / "a.csv"))
    arguments = {name: file if value == "{}" else value for name, value in arguments.items()}
    with pytest.raises(InputError, match=message):
        load_texts(DataArguments(**arguments))


def test_a_checkpoint_without_padding_or_none_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot load"):
        build_model(ModelArguments(model_name_or_path=str(tmp_path)), ["a", "b"], [], 16)


def test_from_the_command_line_to_a_pipeline(tmp_path: Path) -> None:
    file, output = made_file(tmp_path / "train.csv", count=400), tmp_path / "out"
    command = f"--train_file {file} --output_dir {output} {SIZES} --use_cpu --disable_tqdm true --num_train_epochs 4"
    training = "--learning_rate 1e-2 --per_device_train_batch_size 16 --logging_steps 10 --report_to none"
    lgp = "--lgp_control_fraction 0.25"
    metrics = train_text.main(f"{command} {training} {lgp}".split())
    assert metrics["eval_accuracy"] > 0.9
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any(entry.get("lgp/fraction") == 0.25 for entry in history)
    assert type(AutoModelForSequenceClassification.from_pretrained(output)).__name__ == "BertForSequenceClassification"
    classify = pipeline("text-classification", str(output), tokenizer=AutoTokenizer.from_pretrained(output))
    assert classify("number 7 is a wonderful thing")[0]["label"] == "praise"
    assert (output / "README.md").is_file()
