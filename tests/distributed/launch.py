"""Starting a script on two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def start(launcher: list[str], script: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder by a launcher, to its end."""
    command = [*launcher, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def on_two_processes(script: str, *arguments: str, launcher: list[str] = TORCHRUN, timeout: float = 300) -> str:
    """Run a script of this folder on two processes.

    Args:
        script: The script's file name.
        arguments: Its arguments.
        launcher: Command that starts it.
        timeout: Limit in seconds.

    Returns:
        What both wrote to standard output.

    Raises:
        AssertionError: If a process failed.
    """
    result = start(launcher, script, *arguments, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
