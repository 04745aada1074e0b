"""The command ``hf-lgp``.

``hf-lgp probe SCRIPT ARGUMENTS`` runs a training script of any kind, the user's own included, up to the point where it would start to train, and
there finds out whether predictions would pay for its model, data and arguments.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from torch import nn
from transformers import Trainer

from .probe import probe


class _TrainingReached(BaseException):
    """Leaves a script where it starts to train, with its trainer; not an ``Exception``, which the script might catch."""


def _reached(trainer: Trainer, *args: Any, **kwargs: Any) -> NoReturn:
    raise _TrainingReached(trainer)


def trainer_of(script: Path, arguments: Sequence[str]) -> Trainer | None:
    """The trainer that a script builds, as it stands when its ``train`` is called; None if that never happens."""
    command, path = [str(script), *arguments], [str(script.resolve().parent), *sys.path]
    try:
        with (
            patch.object(sys, "argv", command),
            patch.object(sys, "path", path),
            patch.object(Trainer, "train", _reached),
        ):
            runpy.run_path(str(script), run_name="__main__")
    except _TrainingReached as reached:
        return reached.args[0]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="hf-lgp", description=__doc__.strip().splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    probing = commands.add_parser(
        "probe", help="find out whether predictions would pay for a training script's model and data"
    )
    probing.add_argument("script", type=Path, help="a script that trains with Trainer or LGPTrainer")
    probing.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own command line")
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"{options.script}: there is no such file.")
    trainer = trainer_of(options.script, options.arguments)
    if trainer is None or not isinstance(trainer.model, nn.Module):
        print(f"{options.script} ended without calling `Trainer.train`.", file=sys.stderr)
        return 1
    try:
        report = probe(
            trainer.model,
            trainer.train_dataset,
            trainer.args,
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
            compute_loss_func=trainer.compute_loss_func,
            # Bound to the script's own trainer, with whatever it keeps for it.
            **({} if type(trainer).compute_loss is Trainer.compute_loss else {"compute_loss": trainer.compute_loss}),
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(report)
    return 0
