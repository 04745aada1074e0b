"""Every command in README, docs and examples: those that need neither network nor GPU run as written, the others parse and name what they need."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
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
    "uv run": "uv",
}
"""What a command needs beyond a fresh environment, by what stands in it; the text around it has to say so."""

ELSEWHERE = re.compile(
    r"pip install \S.*|make (venv|help|lint|test|lint types test|test-slow|test-device|commands|docs|package|versions)|bash \.ci/(run|versions)"
)
"""Commands that set the environment up, are this test suite, or take an environment of their own."""


@dataclass(frozen=True)
class Command:
    """One command of a document, continuation lines joined, and the rest of the section it stands in."""

    path: Path
    text: str
    around: str

    @property
    def needs(self) -> set[str]:
        return {need for sign, need in NEEDS.items() if sign in self.text}


def joined(text: str) -> str:
    return re.sub(r"\s*\\\n\s*", " ", text)


def documented() -> list[Command]:
    found = []
    for path in DOCUMENTS:
        for section in re.split(r"^(?=## )", joined(path.read_text(encoding="utf-8")), flags=re.M):
            blocks = re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)
            lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
            inline = re.findall(r"`((?:python|bash|pip install|make) [^`]+|hf-lgp probe [^`]*\.py[^`]*)`", section)
            lines += [line for line in inline if line != "make cards"]  # spoken of, with its folder named before
            prose = re.sub(r"^```bash\n.*?^```", "", section, flags=re.M | re.S)
            found += [Command(path, line, prose) for line in dict.fromkeys(lines) if line and not line.startswith("#")]
    for path in EXAMPLES:
        text = joined(path.read_text(encoding="utf-8").split('"""')[1])
        lines = re.findall(r"^ {4}(python .*)$|``(python .*?)``", text, re.M)
        lines = [first or second for first, second in lines]
        found += [Command(path, line, re.sub(r"^ {4}python .*$", "", text, flags=re.M)) for line in lines]
    return found


COMMANDS = [command for command in documented() if not ELSEWHERE.fullmatch(command.text)]


def named(commands: list[Command]) -> list[object]:
    return [pytest.param(command, id=f"{command.path.name}: {command.text[:60]}") for command in commands]


def test_commands_are_found() -> None:
    assert Counter(command.path.name for command in COMMANDS) == {
        "README.md": 7,
        "CONTRIBUTING.md": 1,
        "recipes.md": 9,
        "tuning.md": 1,
        "demo.py": 1,
        "swap.py": 1,
        "train_text.py": 2,
        "train_vit.py": 3,
        "walkthrough.py": 1,
    }


@pytest.mark.parametrize("command", named(COMMANDS))
def test_a_command_names_targets_flags_and_files_that_exist(command: Command) -> None:
    words = shlex.split(command.text)
    scripts = [word for word in words if word.startswith("examples/") and word.endswith(".py")]
    assert scripts or words[0] in ("make", "hf")
    for word in words:
        if word.startswith("examples/"):
            assert (ROOT / word).is_file()
    flags = words[words.index(scripts[0]) + 1 :] if scripts else []
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert words[1] in targets
        settings = dict(word.split("=", 1) for word in words[2:])
        if words[1] == "train":
            scripts, flags = ["examples/train_vit.py"], ["--output_dir", settings["OUTPUT"], *settings["ARGS"].split()]
    if scripts and scripts[0] in SCRIPTS:
        module = SCRIPTS[scripts[0]]
        parse((module.ModelArguments, module.DataArguments), [*flags, "--use_cpu"])


@pytest.mark.parametrize("command", named([command for command in COMMANDS if command.needs]))
def test_what_a_command_needs_is_said_beside_it(command: Command) -> None:
    for need in command.needs:
        assert need in command.around


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone beside the user's own data."""
    folder = tmp_path_factory.mktemp("clone")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()  # the environment of this process, which `make` takes for its own
    for part in Path(sys.prefix).iterdir():
        (folder / ".venv" / part.name).symlink_to(part)
    (folder / ".venv" / ".installed").unlink(missing_ok=True)
    (folder / ".venv" / ".installed").touch()

    draw = np.random.default_rng(0)
    rows = {}
    for split, count in (("train", 120), ("test", 12)):
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
    reviews = [f"{'good' if n % 2 else 'bad'} item number {n}, {n % 2}" for n in range(400)]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f'"{r[:-3]}",{r[-1]}\n' for r in reviews))
    return folder


@pytest.mark.commands
@pytest.mark.parametrize("command", named([command for command in COMMANDS if not command.needs]))
def test_a_command_runs_as_written(command: Command, clone: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "HOME": str(clone),  # what libraries note there
        "HF_HOME": str(clone / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    command_line = ["bash", "-euc", command.text]
    result = subprocess.run(
        command_line, cwd=clone, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    output = re.search(r"(?:--output_dir |OUTPUT=)(\S+)", command.text)
    if output is not None and "probe" not in command.text:
        assert "held-out accuracy" in result.stdout
        assert (clone / output[1] / "model.safetensors").is_file()
        assert "## Linear gradient prediction" in (clone / output[1] / "README.md").read_text(encoding="utf-8")
