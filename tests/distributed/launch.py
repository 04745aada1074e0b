"""Starting things in other processes: copies of this one, which have everything imported, or by the launchers that users have."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def forked(run: Callable[..., Any], *arguments: str, processes: int = 1) -> list[int | None]:
    """Call a function in copies of this process; several form a group, as torchrun would have it.

    Returns:
        Their exit codes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        if processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run(*arguments)

    children = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(processes)]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=300)
    return [process.exitcode for process in children]


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
