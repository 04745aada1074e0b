"""Pushing to the Hub and pulling from it, against a stand-in on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from client import REPOSITORIES
from huggingface_hub import ModelCard
from safetensors.torch import load as load_safetensors
from stand_in import TOKEN, StandIn, stand_in

ROOT = {"README.md", "config.json", "model.safetensors", "training_args.bin", ".gitattributes"}
if importlib.util.find_spec("matplotlib"):
    ROOT |= {"lgp.png"}


def client(hub: StandIn, folder: Path, command: str) -> None:
    """Run a command of ``client.py`` in a process of its own."""
    # Nothing of the Hub's may come from the environment of whoever runs the tests.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {
        **inherited,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]),
    }
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("client.py")), command, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "measured anew" not in result.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path]]:
    """A stand-in that three runs, one per strategy, were pushed to, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("hub")
    with stand_in() as hub:
        client(hub, folder, "strategies")
        yield hub, folder
        assert hub.unknown == []


@pytest.mark.parametrize("strategy", REPOSITORIES)
def test_the_root_is_a_plain_checkpoint_with_a_card(strategy: str, pushed: tuple[StandIn, Path]) -> None:
    hub, folder = pushed
    files = hub.files(REPOSITORIES[strategy])
    assert {path for path in files if "/" not in path} == ROOT
    assert json.loads(files["config.json"])["architectures"] == ["ViTForImageClassification"]
    assert files["model.safetensors"] == (folder / strategy / "model.safetensors").read_bytes()
    assert not any("lgp" in name for name in load_safetensors(files["model.safetensors"]))
    assert files["README.md"].decode().count("## Linear gradient prediction") == 1
    assert f'from_pretrained("{REPOSITORIES[strategy]}")' in files["README.md"].decode()


def test_each_strategy_commits_what_it_promises(pushed: tuple[StandIn, Path]) -> None:
    hub, _ = pushed
    steps = [f"Training in progress, step {step}" for step in (5, 10)]
    assert hub.summaries(REPOSITORIES["end"]) == ["End of training"]
    assert hub.summaries(REPOSITORIES["every_save"]) == [*steps, "End of training"]
    both = [summary for step in steps for summary in (step, f"{step}, checkpoint")]
    assert hub.summaries(REPOSITORIES["checkpoint"]) == [*both, "End of training"]
    for strategy in ("end", "every_save"):
        assert not any("/" in path for path in hub.files(REPOSITORIES[strategy])), "no checkpoint folders"


def test_the_last_checkpoint_holds_what_was_measured(pushed: tuple[StandIn, Path]) -> None:
    hub, folder = pushed
    files = hub.files(REPOSITORIES["checkpoint"])
    nested = {path.removeprefix("last-checkpoint/"): content for path, content in files.items() if "/" in path}
    local = folder / "checkpoint" / "checkpoint-10"
    assert nested == {path.name: path.read_bytes() for path in local.iterdir()}
    assert {"lgp_state.safetensors", "lgp_state.json", "optimizer.pt", "trainer_state.json"} <= set(nested)


def test_the_pushed_card_is_complete(pushed: tuple[StandIn, Path]) -> None:
    hub, _ = pushed
    card = ModelCard(hub.files(REPOSITORIES["every_save"])["README.md"].decode())
    assert {"lgp", "hf_lgp", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert "control fraction: 0.25 in 100%" in card.text and "variance that predictions explain" in card.text
    assert "- `lgp_control_fraction`: 0.25" in card.text
    assert ("](lgp.png)" in card.text) == ("lgp.png" in ROOT)


def test_what_was_pushed_loads_where_hf_lgp_does_not_exist(pushed: tuple[StandIn, Path]) -> None:
    hub, folder = pushed
    client(hub, folder, "pull")
    for strategy in REPOSITORIES:
        expected = torch.load(folder / f"{strategy}.pt")["logits"]
        assert torch.equal(torch.load(folder / f"pulled-{strategy}.pt"), expected)


def test_a_pulled_checkpoint_goes_on_as_if_nothing_had_happened(pushed: tuple[StandIn, Path]) -> None:
    _, folder = pushed
    expected, found = (torch.load(folder / f"{name}.pt") for name in ("straight", "resumed"))
    assert expected.pop("steps") == found.pop("steps")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_an_interrupted_push_leaves_local_files_alone_and_can_be_repeated(tmp_path: Path) -> None:
    with stand_in() as hub:
        # The pushes of steps 5 and 10 fail behind the run's back, those of 15 and 16 succeed; then come those that are waited for.
        hub.failures = ["500", "closed", "", "", "500", "closed", "lost"]
        client(hub, tmp_path, "interrupted")
        attempts = json.loads((tmp_path / "attempts.json").read_text())
        ends = [attempt["ended"] for attempt in attempts]
        assert ends[0] == "HfHubHTTPError" and len(ends) == 4 and ends[-1] == "pushed" and "pushed" not in ends[:-1]
        assert all(attempt["files"] == attempts[0]["files"] for attempt in attempts)
        # The commit whose answer was lost is not made twice: nothing has changed since.
        during = [f"Training in progress, step {step}" for step in (15, 16)]
        assert hub.summaries("me/interrupted") == [*during, "End of training"]
        root = {path: content for path, content in hub.files("me/interrupted").items() if path != ".gitattributes"}
        assert {*root, ".gitattributes"} == ROOT
        for path, content in root.items():
            assert hashlib.sha256(content).hexdigest() == attempts[0]["files"][path]
        uploads = [request for request in hub.requests if request.startswith("PUT")]
        assert len(uploads) == len(set(uploads)), "large files travel once"
        assert hub.unknown == []
