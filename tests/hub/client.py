"""What the Hub tests run in processes of their own: ``huggingface_hub`` reads its endpoint when it is imported.

python client.py strategies FOLDER    train and push with every hub strategy; pull the last checkpoint and go on from it
python client.py interrupted FOLDER   push until the push goes through
python client.py pull FOLDER          load what was pushed, where hf_lgp cannot be imported
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

STOP = 10
"""The step after which the pushed runs stop; their schedule goes on to `STEPS`."""

STEPS = 16

REPOSITORIES = {"every_save": "me/every-save", "checkpoint": "me/with-checkpoint", "end": "me/at-the-end"}


def fixed_images() -> torch.Tensor:
    """Images whose logits are compared."""
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def trainer_for(folder: Path, stop: bool = False, **settings: Any) -> Any:
    """A trainer of a tiny ViT that writes cards and figures."""
    import numpy as np
    from tiny import TinyImages, tiny_vit
    from transformers import TrainerCallback

    from hf_lgp import LGPTrainer, LGPTrainingArguments

    class Pace(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= stop and state.global_step == STOP

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.push_to_hub:  # or a push would be left out because the one before it is not through
                trainer._finish_current_push()

    data = TinyImages(200, dtype=torch.float32)
    arguments = LGPTrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 5,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_accumulation_steps": 5,  # the first measurement is read at the 41st micro-batch
            "lgp_control_fraction": 0.25,
            **settings,
        },
    )
    trainer = LGPTrainer(
        tiny_vit(torch.float32),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))},
        callbacks=[Pace()],
    )
    return trainer


def save_weights(trainer: Any, path: Path) -> None:
    """Weights and counts of a run that ended, and the logits of its model."""
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(pixel_values=fixed_images()).logits
    torch.save({"logits": logits, "steps": trainer._lgp_steps, **model.state_dict()}, path)


def strategies(folder: Path) -> None:
    """Train and push with every hub strategy, and once without a push and without a stop, for comparison."""
    for strategy, repo in REPOSITORIES.items():
        trainer = trainer_for(folder / strategy, stop=True, push_to_hub=True, hub_strategy=strategy, hub_model_id=repo)
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(dataset="me/tiny-images")
        save_weights(trainer, folder / f"{strategy}.pt")
    trainer = trainer_for(folder / "straight")
    trainer.train()
    save_weights(trainer, folder / "straight.pt")
    resume(folder)


def resume(folder: Path) -> None:
    """Pull the last checkpoint and go on from it."""
    from huggingface_hub import snapshot_download

    pulled = snapshot_download(REPOSITORIES["checkpoint"], allow_patterns="last-checkpoint/*")
    trainer = trainer_for(folder / "resumed")
    trainer.train(resume_from_checkpoint=str(Path(pulled) / "last-checkpoint"))
    save_weights(trainer, folder / "resumed.pt")


def interrupted(folder: Path) -> None:
    """Push until the push goes through; note how each attempt ended and what the local files are then."""
    output = folder / "interrupted"
    trainer = trainer_for(output, push_to_hub=True, hub_strategy="every_save", hub_model_id="me/interrupted")
    trainer.train()
    states = []
    for _ in range(5):
        try:
            trainer.push_to_hub()
            ended = "pushed"
        except Exception as error:
            ended = type(error).__name__
        files = {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        states.append({"ended": ended, "files": digests})
        if ended == "pushed":
            break
    (folder / "attempts.json").write_text(json.dumps(states))


def pull(folder: Path) -> None:
    """Load what was pushed, where hf_lgp cannot be imported, and save its logits."""
    sys.modules["hf_lgp"] = None  # type: ignore[assignment]
    try:
        import hf_lgp  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("hf_lgp can be imported after all")
    from transformers import AutoModelForImageClassification

    for strategy, repo in REPOSITORIES.items():
        model, info = AutoModelForImageClassification.from_pretrained(repo, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            torch.save(model.eval()(pixel_values=fixed_images()).logits, folder / f"pulled-{strategy}.pt")


if __name__ == "__main__":
    {run.__name__: run for run in (strategies, interrupted, pull)}[sys.argv[1]](Path(sys.argv[2]))
