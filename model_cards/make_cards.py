"""Train the models of this folder with the example script, and keep their cards and results.

    python model_cards/make_cards.py --cifar10 FOLDER_WITH_PARQUET_FILES [NAME ...]

Every model gets a folder with the card as it would be pushed (``README.md``), and ``results.json``: command, metrics, log and
environment. ``tests/test_model_cards.py`` checks that cards and results agree. The weights are not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

HERE = Path(__file__).parent

_VIT_145 = (
    "--image_size 48 --patch_size 4 --max_train_samples 2000 --max_eval_samples 1000 --num_train_epochs 3 --per_device_train_batch_size 64 "
    "--learning_rate 1e-3 --warmup_steps 10 --logging_steps 10"
)
_CIFAR = "--train_file cifar10/train.parquet --validation_file cifar10/test.parquet"
_COMMON = "--per_device_eval_batch_size 250 --save_strategy no --report_to none --disable_tqdm true --use_cpu"

RUNS: dict[str, tuple[str, str]] = {
    "digits-vit-lgp": (
        "scikit-learn digits",
        "--image_size 16 --patch_size 4 --hidden_size 64 --num_hidden_layers 4 --random_crop_padding 1 --num_train_epochs 70 "
        "--per_device_train_batch_size 64 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 100 --logging_steps 100",
    ),
    "cifar10-vit-exact": ("cifar10", f"{_CIFAR} {_VIT_145} --trainer exact"),
    "cifar10-vit-lgp": ("cifar10", f"{_CIFAR} {_VIT_145}"),
}
"""Name: the data set's, and the arguments of the example script."""

SAME_TASK = {"cifar10-vit-lgp": "cifar10-vit-exact"}
"""Cards that name the time of an exact run with the same arguments."""


def command_of(name: str) -> str:
    """The command that trains a model, as its card has it."""
    return f"python examples/train_vit.py --output_dir outputs/{name} {RUNS[name][1]} {_COMMON}"


def train(name: str, where: Path) -> Path:
    """Run the command in a folder and return the output folder."""
    program, *arguments = shlex.split(command_of(name))
    assert program == "python"
    subprocess.run([sys.executable, *arguments], cwd=where, check=True)
    return where / "outputs" / name


def keep(name: str, output: Path) -> None:
    """Keep card and results of a finished run."""
    target = HERE / name
    target.mkdir(exist_ok=True)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    metrics = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    # The evaluation came after the state was saved.
    log = [*state["log_history"], {k: v for k, v in metrics.items() if k.startswith("eval_")}]
    results = {
        "command": command_of(name),
        "metrics": metrics,
        "environment": {
            "device": f"{os.cpu_count()} cores of {platform.machine()}",
            "python": platform.python_version(),
            **{package: version(package) for package in ("hf-lgp", "torch", "transformers", "accelerate")},
        },
        "log_history": log,
    }
    (target / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    card = ModelCard.load(output / "README.md")
    card.data = metadata(name, card.data, log)
    card.text = with_run(name, with_origin(name, card.text), results)
    card.save(target / "README.md")
    if (output / "lgp.png").is_file():
        shutil.copy(output / "lgp.png", target)
    print(f"kept {target}", flush=True)


def metadata(name: str, found: ModelCardData, log: list[dict[str, Any]]) -> ModelCardData:
    """The card's metadata: what the trainer wrote, with data set and results named."""
    dataset = RUNS[name][0]
    found.license, found.model_name, found.library_name = "apache-2.0", name, "transformers"
    found.tags = list(dict.fromkeys([*(found.tags or []), "image-classification", "vision"]))
    found.datasets = ["uoft-cs/cifar10"] if dataset == "cifar10" else None
    found.base_model = None  # a folder of the same run, which no Hub knows
    found.metrics = ["accuracy"]
    last = next(entry for entry in reversed(log) if "eval_accuracy" in entry)
    found.eval_results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type="uoft-cs/cifar10" if dataset == "cifar10" else "unknown",
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric.capitalize(),
            metric_value=last[f"eval_{metric}"],
        )
        for metric in ("loss", "accuracy")
    ]
    return found


ORIGIN = re.compile(
    r"This model (?:is a fine-tuned version of \[(.*?)\]\(\S*\)|was trained from scratch) on an unknown dataset\."
)
"""What the trainer can say of a model that was given as folders: neither exists on the Hub."""


def with_origin(name: str, text: str) -> str:
    """The card's text with the model's beginnings and data set by name."""

    def named(found: re.Match[str]) -> str:
        before = f"is `{Path(found[1]).name}`, fine-tuned" if found[1] else "was trained from scratch"
        return f"This model {before} on {RUNS[name][0]}."

    return ORIGIN.sub(named, text)


def with_run(name: str, text: str, results: dict[str, Any]) -> str:
    """The card's text with the run's command, hardware and time."""
    seconds = f"{results['metrics']['train_runtime']:.0f} s"
    lines = [
        "## How it was trained",
        f"```bash\n{results['command']}\n```",
        f"In the repository of hf_lgp, {'with CIFAR-10 as parquet files in `cifar10`, ' if 'cifar10/' in results['command'] else ''}on "
        f"{results['environment']['device']}, in {seconds}. The weights are not published: the command makes them.",
    ]
    other = HERE / SAME_TASK.get(name, "none") / "results.json"
    if other.is_file():
        exact = json.loads(other.read_text(encoding="utf-8"))["metrics"]
        lines.append(
            f"`Trainer` took {exact['train_runtime']:.0f} s on the same machine (`{SAME_TASK[name]}`), and reached an accuracy of "
            f"{exact['eval_accuracy']:.4f}; this model reached {results['metrics']['eval_accuracy']:.4f}. One seed each."
        )
    head = "## Linear gradient prediction" if "## Linear gradient prediction" in text else None
    block = "\n\n".join(lines)
    marker = "<!-- hf_lgp: this section is generated -->"
    if head and marker in text:
        return text.replace(marker, f"{block}\n\n{marker}")
    return f"{text.rstrip()}\n\n{block}\n"


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS), help="models to train; all of them by default")
    parser.add_argument("--cifar10", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--where", type=Path, help="folder to train in; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        where = options.where or Path(scratch)
        where.mkdir(exist_ok=True)
        for link, to in (("examples", HERE.parent / "examples"), ("cifar10", options.cifar10)):
            if to is not None and not (where / link).exists():
                (where / link).symlink_to(to.resolve(), target_is_directory=True)
        for name in options.names:
            keep(name, train(name, where))


if __name__ == "__main__":
    main()
