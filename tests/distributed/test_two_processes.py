"""A real run on two processes (gloo, CPU)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("find_unused", [True, False])
def test_ranks_stay_equal_with_predictions_and_accumulation(find_unused: bool, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, str(script), str(tmp_path), str(find_unused)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("agrees") == 2
