"""Every Python block of README and docs runs, and every file they link to exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainingArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


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
        lgp_warmup_examples=16,
        lgp_window=32,
        lgp_rank=3,
    )
    names: dict[str, Any] = {"model": tiny_vit(torch.float32), "args": args, "data": data, "train_dataset": data}
    exec(compile(block, "block", "exec"), names)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
