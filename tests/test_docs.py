"""Every Python block of README and docs runs, links lead somewhere, arguments and log keys are documented, and nothing speaks of what is gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

import hf_lgp
from hf_lgp import LGPSettings, LGPTrainingArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
    if "ViTConfig" not in block  # a whole program has a test of its own
]
OFFLINE = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
RETIRED = re.compile(
    r"lgp_(head|class_path|memory_steps|observe_\w+|refit_steps|basis_steps|warmup_examples|rho2|exact_share|coverage|price)\b"
    r"|HeadNotFoundError|SpliceBypassedError|[Cc]lass[- ]token path|injection\.py|class_path\.py"
)
"""Names that nothing has any more."""


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = TinyImages(64, dtype=torch.float32)
    args = LGPTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        lgp_exact_steps=0,
    )
    names: dict[str, Any] = {"model": tiny_vit(torch.float32), "args": args, "data": data, "train_dataset": data}
    exec(compile(block, "block", "exec"), names)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_and_sections_lead_somewhere(path: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        found = path.parent / target if target else path
        assert found.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), re.M)
            assert section in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, section


def test_every_document_is_linked_from_the_readme() -> None:
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    for path in DOCUMENTS[1:]:
        assert f"]({path.relative_to(ROOT)})" in readme, path.name


def test_every_argument_is_documented() -> None:
    text, default = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8"), LGPSettings()
    for setting in fields(LGPSettings):
        assert f"`lgp_{setting.name}`" in text, setting.name
        if getattr(default, setting.name) is not None:
            value = getattr(default, setting.name)
            shown = f"`{value}`" if isinstance(value, str) else f"{value:g}"
            assert f"| `lgp_{setting.name}` | {shown} |" in text, "the default in the table is another one"
    assert set(re.findall(r"`lgp_(\w+)`", text)) <= {setting.name for setting in fields(LGPSettings)}


def test_log_keys_are_documented() -> None:
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    predicted = (
        "variance_explained",
        "variance",
        "step_time",
        "seconds_saved",
        "steps_predicted",
        "examples_predicted",
    )
    for key in ("fraction", *predicted):
        assert f"`lgp/{key}`" in text, key


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "hf_lgp").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_speaks_of_what_is_gone(path: Path) -> None:
    assert RETIRED.search(path.read_text(encoding="utf-8")) is None


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.parent.name == "docs"], ids=lambda path: path.name)
def test_files_and_names_in_code_marks_exist(path: Path) -> None:
    """Of the package: ``module.py``, and ``folder/module.py``, are files of it."""
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", path.read_text(encoding="utf-8")):
        assert (ROOT / "hf_lgp" / name).is_file() or (ROOT / name).is_file(), name


def test_the_readme_fits() -> None:
    lines = DOCUMENTS[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    start, end = (
        lines.index(mark) for mark in ("<!-- tables: benchmarks/tables.py --write -->", "<!-- end of tables -->")
    )
    assert start < end < 40


def test_the_program_to_copy_is_short_and_runs_as_printed(tmp_path: Path) -> None:
    """In an empty folder with nothing but the package; ``make package`` runs it to its end."""
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "ViTConfig" in block)
    assert len(program.splitlines()) <= 30
    shorter = program.replace("num_train_epochs=3", "max_steps=2, use_cpu=True").replace("5120", "640")
    assert shorter.count("max_steps=2") == 1 and "640" in shorter
    run = [sys.executable, "-c", shorter]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=OFFLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy on images held out: " in done.stdout and "LGPTrainer: all gradients were exact" in done.stderr


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: (\S+)", reference, re.M)) == {f"hf_lgp.{name}" for name in hf_lgp.__all__}


def test_the_picture_is_what_its_source_draws() -> None:
    svg, source = (ROOT / "docs" / "images" / name for name in ("one_step.svg", "one_step.py"))
    words = re.findall(r'"([a-z][^"\\]{6,})"', source.read_text(encoding="utf-8"))
    shown = [word for word in words if word in svg.read_text(encoding="utf-8")]
    assert {"a random few", "all others", "exact gradients"} <= set(shown)
