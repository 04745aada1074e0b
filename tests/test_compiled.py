"""torch.compile: predictions without hooks in compiled code but the head's, and few graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_trainer import Case, check
from tiny import TinyImages, tiny_vit

from hf_lgp import LGPTrainer, LGPTrainingArguments


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_trainer(folder: Path, backend: str, dropout: float = 0.0, **settings: Any) -> LGPTrainer:
    arguments = LGPTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=8,
        num_train_epochs=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        torch_compile=True,
        torch_compile_backend=backend,
        lgp_control_fraction=0.5,
        lgp_warmup_examples=16,
        lgp_window=32,
        lgp_rank=3,
        lgp_refit_steps=2,
        **settings,
    )
    data = TinyImages(46, dtype=torch.float32)  # the last batch of an epoch holds six
    trainer = LGPTrainer(tiny_vit(torch.float32, dropout=dropout), arguments, train_dataset=data, eval_dataset=data)
    trainer._lgp_close = lambda: None  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_with_predictions_needs_at_most_six_graphs(backend: str, tmp_path: Path) -> None:
    trainer = compiled_trainer(tmp_path, backend)
    trainer.train()
    assert trainer._lgp_steps == {"exact": 4, "predicted": 14}
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    engine = trainer._lgp_engine
    assert engine is not None and engine.path is not None
    path, ridge = (coefficients.mean() for coefficients in engine.predictor.alignment.coefficients)
    assert path > 0.5 and ridge > 0, "what is observed apart makes predictions worth something"
    assert trainer.evaluate()["eval_loss"] < 1.2
    engine.close()


@pytest.mark.parametrize(
    "case", [Case("vit", "cross-entropy", 3), Case("bert", "label smoothing", 1)], ids=lambda case: case.family
)
def test_oracle_gradients_are_those_of_plain_compiled_training(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")


def test_compiled_models_with_dropout_leave_the_path_alone(tmp_path: Path) -> None:
    """Notes of another forward carry another dropout than the residuals they would be paired with."""
    trainer = compiled_trainer(tmp_path, "eager", dropout=0.1, max_steps=6)
    trainer.train()
    assert trainer._lgp_steps["predicted"] == 2
    engine = trainer._lgp_engine
    assert engine is not None and engine.path is None and not engine.predicts_all
    engine.close()


def test_observing_apart_leaves_gradients_and_random_streams_alone(tmp_path: Path) -> None:
    trainer = compiled_trainer(tmp_path, "eager", dropout=0.1, max_steps=4)
    trainer.train()
    engine = trainer._lgp_engine
    assert engine is not None
    trainer.model.zero_grad()
    batch, state = TinyImages(8, dtype=torch.float32).batch(0, 8), torch.get_rng_state()
    trainer._lgp_observe(batch, 8, seed=3)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    observation = engine.observer.current
    assert observation is not None and observation.features is not None and observation.pullbacks is not None
    engine.close()
