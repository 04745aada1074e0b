"""Runs side by side that take turns: only one works at a time, so that a machine that grows slower meanwhile does so for all of them.

The referee starts every run in a process of its own and lets one after the other work for a moment; the others wait and use no
processor. They talk over standard input and output, a line each way per turn.
"""

from __future__ import annotations

import subprocess
import sys
import time

_OVER = "-- the others' turn --"


class Turns:
    """A run's side.

    Args:
        seconds: Length of a turn; 0 if the run is alone and never waits.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = 0.0

    @property
    def over(self) -> bool:
        """Whether it is time for the others."""
        return self.seconds > 0 and time.perf_counter() - self._began > self.seconds

    def wait(self) -> None:
        """Let the others work until it is this run's turn again."""
        if self.seconds > 0:
            print(_OVER, flush=True)
            if not sys.stdin.readline():
                raise SystemExit("The referee is gone.")
            self._began = time.perf_counter()


def referee(commands: list[list[str]]) -> None:
    """Run all commands, each for one turn at a time, until all have ended.

    Everything before a command's first turn is theirs in order as well: none is disturbed by another's start.

    Raises:
        subprocess.CalledProcessError: If one of them fails; the others are stopped.
    """
    runs: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            runs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            _one_turn(runs[-1])
        while waiting := [run for run in runs if run.poll() is None]:
            for run in waiting:
                assert run.stdin is not None
                run.stdin.write("\n")
                run.stdin.flush()
                _one_turn(run)
    finally:
        for run in runs:
            run.kill()


def _one_turn(run: subprocess.Popen[str]) -> None:
    """Pass on what a run prints until its turn is over or it has ended."""
    assert run.stdout is not None
    for line in run.stdout:
        if line.rstrip("\n") == _OVER:
            return
        print(line, end="", flush=True)
    if run.wait() != 0:
        raise subprocess.CalledProcessError(run.returncode, run.args)
