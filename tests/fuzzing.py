"""Training runs under arbitrary valid settings, for the fuzz test and its long version."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from tiny import TEXT_FAMILIES, TinyImages, TinyTexts, hooks_of, tiny_model

from hf_lgp import LGPTrainer, LGPTrainingArguments

LABELS: dict[str, dict[str, Any]] = {
    "class": {},
    "ignored": {},
    "multi": {"problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A model, data, and settings of a short training run; every combination is valid."""
    window = draw(st.integers(2, 64))
    family = draw(st.sampled_from(["vit", "deit", "beit", "dinov2", "swin", "convnext", "bert"]))
    return {
        "family": family,
        "labels": draw(st.sampled_from(list(LABELS))),
        "examples": draw(st.integers(5, 40)),
        "arguments": {
            "per_device_train_batch_size": draw(st.integers(1, 9)),
            "gradient_accumulation_steps": draw(st.integers(1, 3)),
            "max_grad_norm": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "seed": draw(st.integers(0, 100)),
            "gradient_checkpointing": family != "convnext" and draw(st.booleans()),
            "lgp_control_fraction": draw(st.just(0.0) | st.floats(0.01, 1.0)),
            "lgp_variance_budget": draw(st.sampled_from([0.0, 1.1, 1.3])),
            "lgp_exact_steps": draw(st.sampled_from([0, 0, 3])),
            "lgp_window": window,
            "lgp_warmup_examples": draw(st.integers(1, window)),
            "lgp_rank": draw(st.integers(1, 9)),
            "lgp_kernel": draw(st.sampled_from(["linear", "rbf"])),
            "lgp_ridge": 10.0 ** draw(st.floats(-4, 1)),
            "lgp_memory_steps": draw(st.integers(1, 500)),
            "lgp_observe_examples": draw(st.integers(2, 16)),
            "lgp_observe_steps": draw(st.integers(0, 4)),
            "lgp_refit_steps": draw(st.integers(0, 5)),
            "lgp_basis_steps": draw(st.integers(0, 5)),
            "lgp_class_path": draw(st.booleans()),
            "lgp_seed": draw(st.integers(0, 2**40)),
        },
    }


def check_run(run: dict[str, Any], folder: str) -> int:
    """Train for twelve steps and check what must hold whatever the settings.

    Returns:
        Number of micro-batches with predictions.

    Raises:
        AssertionError: If parameters or readings are not finite or out of range, steps are missing, or hooks are left behind.
    """
    data = TinyTexts if run["family"] in TEXT_FAMILIES else TinyImages
    model = tiny_model(run["family"], torch.float32, **LABELS[run["labels"]])
    arguments = LGPTrainingArguments(
        folder,
        use_cpu=True,
        max_steps=12,
        learning_rate=1e-3,
        logging_steps=3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **run["arguments"],
    )
    trainer = LGPTrainer(model, arguments, train_dataset=data(run["examples"], run["labels"], torch.float32))
    trainer.train()
    assert trainer.state.global_step == 12
    assert hooks_of(model) == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for entry in trainer.state.log_history:
        # Micro-batches without a single label have no loss, with plain Trainer too.
        assert run["labels"] == "ignored" or math.isfinite(entry.get("loss", 0.0)), entry
        assert 0.0 <= entry.get("lgp_rho2", 0.0) <= 1.0 and 0.0 <= entry.get("lgp_alpha", 0.0) <= 2.0, entry
        assert 0.0 <= entry.get("lgp_coverage", 0.0) <= 1.0 and entry.get("lgp_nonfinite", 0.0) == 0.0, entry
    return trainer._lgp_steps["predicted"]
