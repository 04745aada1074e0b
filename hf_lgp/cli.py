"""The command ``hf-lgp``.

``hf-lgp probe SCRIPT ARGUMENTS`` runs a training script of any kind, the user's own included, up to the point where it would start to train, and
there finds out whether predictions would pay for its model, data and arguments.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from torch import nn
from transformers import Trainer

from .probe import ProbeReport, probe


class _Probed(BaseException):
    """Leaves a script where it would train, with what is to be said; not an ``Exception``, which the script might catch."""


def _probe(train: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> NoReturn:
    model = trainer.model
    assert isinstance(model, nn.Module)
    # Bound to the script's own trainer, with whatever it keeps for it.
    own = {} if type(trainer).compute_loss is Trainer.compute_loss else {"compute_loss": trainer.compute_loss}
    try:
        with patch.object(Trainer, "train", train):
            report = probe(
                model,
                trainer.train_dataset,
                trainer.args,
                data_collator=trainer.data_collator,
                processing_class=trainer.processing_class,
                compute_loss_func=trainer.compute_loss_func,
                **own,
            )
    except ValueError as error:
        raise _Probed(None, str(error)) from error
    raise _Probed(report, None)


def report_of(script: Path, arguments: Sequence[str]) -> tuple[ProbeReport | None, str | None]:
    """What a probe finds where a script calls ``Trainer.train``, while the script is still what runs; or why there is nothing to report."""
    command, path = [str(script), *arguments], [str(script.resolve().parent), *sys.path]
    try:
        with (
            patch.object(sys, "argv", command),
            patch.object(sys, "path", path),
            patch.object(Trainer, "train", partialmethod(partial(_probe, Trainer.train))),
        ):
            runpy.run_path(str(script), run_name="__main__")
    except _Probed as probed:
        report, reason = probed.args
        return report, reason
    return None, f"{script} ended without calling `Trainer.train`."


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
    report, reason = report_of(options.script, options.arguments)
    print(reason if report is None else report, file=sys.stderr if report is None else sys.stdout)
    return int(report is None)
