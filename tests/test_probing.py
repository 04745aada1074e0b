"""The probe, as a function and as a command."""

from __future__ import annotations

import random
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyImages, hooks_of, tiny_vit
from transformers import TrainingArguments

from hf_lgp import LGPTrainingArguments, ProbeReport, probe
from hf_lgp.cli import main
from hf_lgp.costs import Costs
from hf_lgp.plans import EXACT, Explained, Plan

QUICK: dict[str, Any] = {"lgp_warmup_examples": 32, "lgp_window": 64, "lgp_rank": 4}


def arguments(folder: Path, **settings: Any) -> LGPTrainingArguments:
    return LGPTrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=8, report_to="none", **QUICK, **settings
    )


def test_a_report_is_complete_and_nothing_is_changed(tmp_path: Path) -> None:
    model, args = tiny_vit(torch.float32), arguments(tmp_path / "never", num_train_epochs=5)
    weights, before = {k: v.clone() for k, v in model.state_dict().items()}, args.to_dict()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report = probe(model, TinyImages(64, dtype=torch.float32), args)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == 0 and args.to_dict() == before and not (tmp_path / "never").exists()
    assert 0 < report.price <= 1 and report.cost > 0 and report.memory_mib > 0 and report.exact_seconds > 0
    assert report.coverage == 1.0 and report.on_path and 0 <= report.rho2 <= 1
    assert set(report.rho2_by_block) == {"embeddings and norms", "block 0", "block 1"}
    assert report.verdict in str(report) and "kappa" in str(report)


def test_plain_arguments_or_none_will_do(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=64, report_to="none")
    assert isinstance(probe(tiny_vit(torch.float32), TinyImages(640, dtype=torch.float32), plain), ProbeReport)


def test_a_fixed_fraction_is_no_obstacle(tmp_path: Path) -> None:
    args = arguments(tmp_path, lgp_control_fraction=1.0, gradient_accumulation_steps=3)
    assert isinstance(probe(tiny_vit(torch.float32), TinyImages(64, dtype=torch.float32), args), ProbeReport)


def test_what_cannot_be_predicted_is_an_error(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.per_device_train_batch_size = 1
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        probe(tiny_vit(torch.float32), TinyImages(64, dtype=torch.float32), args)


def report_of(plan: Plan, price: float) -> ProbeReport:
    return ProbeReport(plan, price, 0.5, 0.35, 0.9, {"block 0": 0.9}, 0.1, 12.0, 1.0, True)


def test_verdicts() -> None:
    assert (
        "do not pay here" in report_of(EXACT, 1.0).verdict
        and "0.35 of an exact example" in report_of(EXACT, 1.0).verdict
    )
    pays = report_of(Plan(0.25), 0.6).verdict
    assert "pay here" in pays and "0.25 of every batch" in pays and "0.60 of the time" in pays
    beyond = replace(report_of(EXACT, 1.0), beyond_budget=(Plan(0.25), 0.8, 1.45)).verdict
    assert (
        "not within the variance budget" in beyond
        and "1.45 times the variance" in beyond
        and "0.80 of the time" in beyond
    )


def test_what_the_budget_alone_rules_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Whatever this machine's times and the model's gradients are: predictions explain 0.8 at half the cost.
    monkeypatch.setattr(Costs, "relative", lambda self, plan: 0.5 * (1.0 + plan.fraction))
    monkeypatch.setattr(Explained, "share", property(lambda self: 0.8))
    tight, loose = (
        probe(
            tiny_vit(torch.float32),
            TinyImages(512, dtype=torch.float32),
            arguments(tmp_path, lgp_variance_budget=budget),
        )
        for budget in (1.1, 1.25)
    )
    assert tight.plan.exact and tight.price == 1.0 and tight.beyond_budget is not None
    plan, price, variance = tight.beyond_budget
    assert plan.fraction == 0.5 and price == pytest.approx(0.75 * 1.2) and variance == pytest.approx(1.2)
    assert loose.plan == plan and loose.price == pytest.approx(price) and loose.beyond_budget is None


SCRIPT = """
import sys, torch
from tiny import TinyImages, tiny_vit
from transformers import Trainer, TrainingArguments

if "--idle" not in sys.argv:
    args = TrainingArguments(sys.argv[1], use_cpu=True, per_device_train_batch_size=32, report_to="none")
    try:
        Trainer(tiny_vit(torch.float32), args, train_dataset=TinyImages(512, dtype=torch.float32)).train()
    except Exception:
        print("caught")
    print("trained")
"""


def test_the_command_probes_any_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert main(["probe", str(script), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "expected price" in printed and "trained" not in printed and "caught" not in printed
    assert "LGP:" not in printed and "train_runtime" not in printed


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert main(["probe", str(script), "--idle"]) == 1
    assert "without calling `Trainer.train`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["probe", str(tmp_path / "missing.py")])
    assert "no such file" in capsys.readouterr().err
