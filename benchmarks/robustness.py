"""Long checks of robustness, in figures: a soak, kills at random moments, and fuzzed settings.

- Soak: one training run of many tiny steps, with the resident memory and the processor time of a step at regular intervals.
- Kills: a run with dropout and checkpoints is killed (SIGKILL) at random moments until it is through, resuming from its last
  complete checkpoint every time; its final state is compared bit for bit with that of a run that was left alone.
- Fuzz: short runs under random valid settings of eight model families.

The runs are those of the tests; this script makes more of them.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import RESULTS, environment, write_json
from transformers import TrainerCallback

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from fuzzing import check_run, runs  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from killed_run import STEPS  # noqa: E402
from test_killed_runs import assert_identical  # noqa: E402
from tiny import TinyImages, tiny_vit  # noqa: E402

from hf_lgp import LGPTrainer, LGPTrainingArguments  # noqa: E402


class Gauge(TrainerCallback):
    """Reads memory and processor time per step at regular intervals."""

    def __init__(self, every: int) -> None:
        self.every, self.readings = every, []
        self._begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            now = time.process_time()  # whatever else the machine does
            self.readings.append(
                {
                    "step": state.global_step,
                    "resident_mib": psutil.Process().memory_info().rss / 2**20,
                    "milliseconds_per_step": (now - self._begin) / self.every * 1e3,
                }
            )
            print(self.readings[-1], flush=True)
            self._begin = time.process_time()


def soak(steps: int) -> dict[str, Any]:
    """One run of many tiny steps with predictions, accumulation and logs."""
    gauge = Gauge(max(1, steps // 20))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LGPTrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=1e-3,
            logging_steps=100,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            lgp_control_fraction=0.25,
            lgp_warmup_examples=64,
            lgp_window=256,
            lgp_rank=4,
        )
        data = TinyImages(512, dtype=torch.float32)
        trainer = LGPTrainer(tiny_vit(torch.float32, dropout=0.1), arguments, train_dataset=data, callbacks=[gauge])
        trainer.log = lambda *_, **__: None  # the history of logs grows by itself
        trainer.train()
        shares = dict(trainer._lgp_steps)
    early, late = gauge.readings[2:6], gauge.readings[-4:]  # the first readings are of caches that fill

    def ratio(name: str) -> float:
        return statistics.median(r[name] for r in late) / statistics.median(r[name] for r in early)

    return {
        "steps": steps,
        "micro_batches": shares,
        "memory_late_over_early": ratio("resident_mib"),
        "step_time_late_over_early": ratio("milliseconds_per_step"),
        "readings": gauge.readings,
    }


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, but that of the last step, after which ``Trainer`` takes one more."""
    found = {
        int(path.name.split("-")[1]): path
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file()
    }
    return max((item for item in found.items() if item[0] < STEPS), default=(0, None))[1]


def kills(processes: int, rounds: int, seed: int) -> dict[str, Any]:
    """Runs that are killed at random moments until they are through, compared with one that is left alone."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script, dice = str(TESTS / "distributed" / "killed_run.py"), random.Random(seed)
    killed = resumed = partial = 0
    with tempfile.TemporaryDirectory() as root:
        straight = Path(root) / "straight"
        start = time.perf_counter()
        subprocess.run([*launcher, script, str(straight), "-1"], check=True, capture_output=True)
        whole = time.perf_counter() - start
        expected = torch.load(straight / "final.pt")
        for number in range(rounds):
            folder = Path(root) / str(number)
            for _ in range(50):
                checkpoint = last_complete(folder)
                command = [*launcher, script, str(folder), "-1", *([str(checkpoint)] if checkpoint else [])]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                resumed += checkpoint is not None
                try:
                    # Most of a run is starting up: aim at its second half.
                    process.wait(timeout=dice.uniform(0.5, 1.1) * whole)
                    break
                except subprocess.TimeoutExpired:
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.send_signal(signal.SIGKILL)
                    process.kill()
                    process.wait()
                    killed += 1
                    partial += any(not (path / "trainer_state.json").is_file() for path in folder.glob("checkpoint-*"))
            assert process.returncode == 0, "the run failed by itself"
            assert_identical(expected, torch.load(folder / "final.pt"))
            print(f"round {number}: {killed} kills so far, equal bit for bit", flush=True)
    return {
        "processes": processes,
        "runs": rounds,
        "kills": killed,
        "resumptions": resumed,
        "kills_while_a_checkpoint_was_written": partial,
        "runs_that_ended_bit_for_bit_equal": rounds,
    }


def fuzz(count: int) -> dict[str, Any]:
    """Short runs under random valid settings."""
    taken = predicted = 0

    @given(runs())
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def trains(run: dict[str, Any]) -> None:
        nonlocal taken, predicted
        with tempfile.TemporaryDirectory() as folder:
            predicted += check_run(run, folder)
        taken += 1

    trains()
    return {"runs": taken, "micro_batches_with_predictions": predicted, "failures": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="of the soak")
    parser.add_argument("--rounds", type=int, default=6, help="killed runs, each of one and of two processes")
    parser.add_argument("--fuzz", type=int, default=400, help="runs under random settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=["soak", "kills", "fuzz"], default=["soak", "kills", "fuzz"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.output / "robustness.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    result |= {"environment": environment(torch.device("cpu")), "seed": options.seed}
    parts = {
        "soak": lambda: soak(options.steps),
        "kills": lambda: [kills(processes, options.rounds, options.seed) for processes in (1, 2)],
        "fuzz": lambda: fuzz(options.fuzz),
    }
    for name in options.parts:
        result[name] = parts[name]()
        write_json(file, result)


if __name__ == "__main__":
    main()
