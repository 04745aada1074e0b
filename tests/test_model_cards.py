"""The committed model cards: their metadata are valid, and their numbers are those of the results beside them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

FOLDER = Path(__file__).parents[1] / "model_cards"
sys.path.insert(0, str(FOLDER))
CARDS = sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


def results(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "results.json").read_text(encoding="utf-8"))


def test_there_are_cards_with_and_without_predictions() -> None:
    assert len(CARDS) >= 3
    assert {"exact" in name for name in CARDS} == {True, False}


@pytest.mark.parametrize("name", CARDS)
def test_metadata_are_valid_and_carry_the_result(name: str) -> None:
    card = ModelCard.load(FOLDER / name / "README.md")
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert card.data.model_name == name and "image-classification" in card.data.tags
    assert ({"lgp", "hf_lgp"} <= set(card.data.tags)) == (not name.endswith("exact"))
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    metrics = results(name)["metrics"]
    assert found == {kind: metrics[f"eval_{kind}"] for kind in ("loss", "accuracy")}
    assert "model-index" in card.data.to_dict()


@pytest.mark.parametrize("name", CARDS)
def test_the_command_is_the_scripts_own(name: str) -> None:
    import make_cards
    import train_vit
    from shared import parse

    command = results(name)["command"]
    assert command == make_cards.command_of(name), "the card was made by another command: make it again"
    assert command in (FOLDER / name / "README.md").read_text(encoding="utf-8")
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "examples/train_vit.py")
    model_args, _, training_args = parse((train_vit.ModelArguments, train_vit.DataArguments), arguments)
    assert (model_args.trainer == "exact") == name.endswith("exact")
    assert training_args.output_dir == f"outputs/{name}"


@pytest.mark.parametrize("name", [name for name in CARDS if not name.endswith("exact")])
def test_the_section_tells_the_run_in_the_log(name: str) -> None:
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    readings = [entry for entry in results(name)["log_history"] if "lgp/fraction" in entry]
    exact = all(entry["lgp/fraction"] == 1.0 for entry in readings)
    assert ("every gradient was exact" if exact else f"{readings[-1]['lgp/fraction']:.4g} in") in text
    explained = [entry["lgp/variance_explained"] for entry in readings if "lgp/variance_explained" in entry]
    if explained:
        assert f"{explained[-1]:.3g} at the end" in text
    assert ("](lgp.png)" in text) == (FOLDER / name / "lgp.png").is_file()


@pytest.mark.parametrize("name", CARDS)
def test_accuracies_in_the_text_are_measured_ones(name: str) -> None:
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    known = {f"{results(other)['metrics']['eval_accuracy']:.4f}" for other in CARDS}
    for value in re.findall(r"[Aa]ccuracy(?: of|:)? (0\.\d+)", text) + re.findall(r"reached (0\.\d+)", text):
        assert f"{float(value):.4f}" in known, value
