"""Every command in README, docs and examples: those that need neither network nor GPU run as written, the others parse and name what they need."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import train_text
import train_vit
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from shared import parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = {"examples/train_vit.py": train_vit, "examples/train_text.py": train_text}

NEEDS = {
    "google/": "Hub",
    "google-bert/": "Hub",
    "--dataset_name": "Hub",
    "hf download": "Hub",
    "last-checkpoint": "Hub",
    "one_gpu": "GPU",
    "several_gpus": "GPU",
    "CIFAR=folder": "CIFAR",
}
"""What a command needs beyond a fresh environment, by what stands in it; the text around it has to say so."""

ELSEWHERE = re.compile(r"pip install|make (venv|lint|types|test|test-slow|commands|package|versions)\b")
"""Commands that set the environment up, or that continuous integration runs itself."""


@dataclass(frozen=True)
class Command:
    """One command of a document, continuation lines joined, with the text of the section it stands in."""

    path: Path
    text: str
    section: str

    @property
    def needs(self) -> set[str]:
        return {need for sign, need in NEEDS.items() if sign in self.text}


def lines_of(block: str) -> list[str]:
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def documented() -> list[Command]:
    found = []
    for path in DOCUMENTS:
        for section in re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.M):
            for block in re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S):
                found += [Command(path, line, section) for line in lines_of(block)]
            found += [
                Command(path, text, section)
                for text in re.findall(r"`((?:python|accelerate launch|hf-lgp probe) [^`]*\.py[^`]*)`", section)
            ]
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8").split('"""')[1]
        blocks = re.findall(r"(?:^ {4}python .*(?:\n {8}.*)*)", text, re.M)
        found += [Command(path, line, text) for block in blocks for line in lines_of(block)]
    return found


COMMANDS = [command for command in documented() if not ELSEWHERE.search(command.text)]


def named(commands: list[Command]) -> list[object]:
    return [pytest.param(command, id=f"{command.path.name}: {command.text[:60]}") for command in commands]


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 12
    assert {command.path.name for command in COMMANDS} >= {"README.md", "recipes.md", "train_vit.py", "train_text.py"}


@pytest.mark.parametrize("command", named(COMMANDS))
def test_a_command_names_flags_and_files_that_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.text)
    for word in words:
        if word.startswith("examples/"):
            assert (ROOT / word).is_file()
    script = next((word for word in words if word in SCRIPTS), None)
    if script is not None:
        module = SCRIPTS[script]
        flags = words[words.index(script) + 1 :]
        parse((module.ModelArguments, module.DataArguments), [*flags, "--use_cpu"])


@pytest.mark.parametrize("command", named([command for command in COMMANDS if command.needs]))
def test_what_a_command_needs_is_said_beside_it(command: Command) -> None:
    for need in command.needs:
        assert need in command.section.replace(command.text, "")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone beside the user's own data."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "Makefile",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "examples",
        "hf_lgp",
        "pyproject.toml",
        "tests",
    ):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()  # the environment of this process, which `make` takes for its own
    for part in Path(sys.prefix).iterdir():
        (folder / ".venv" / part.name).symlink_to(part)
    (folder / ".venv" / ".installed").unlink(missing_ok=True)
    (folder / ".venv" / ".installed").touch()

    draw = np.random.default_rng(0)
    rows = {}
    for split, count in (("train", 60), ("test", 12)):
        pictures, labels = [], []
        for label, name in enumerate(("circles", "noise", "stripes")):
            images = folder / "images" / split / name
            images.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 60, (20, 20, 3))
                pixels[..., label] += 150
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(images / f"{index}.png")
                pictures.append(picture)
                labels.append(label)
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["circles", "noise", "stripes"])})
        rows[split] = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows[split].to_parquet(str(folder / f"{split}.parquet"))
    reviews = [f"{'good' if n % 2 else 'bad'} item number {n}, {n % 2}" for n in range(200)]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f'"{r[:-3]}",{r[-1]}\n' for r in reviews))
    return folder


@pytest.mark.commands
@pytest.mark.parametrize("command", named([command for command in COMMANDS if not command.needs]))
def test_a_command_runs_as_written(command: Command, clone: Path) -> None:
    tools = f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euc", command.text],
        cwd=clone,
        env={**os.environ, "PATH": tools, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
