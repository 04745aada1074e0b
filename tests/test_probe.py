"""The probe: what it reports, that it leaves everything as it was, and the command that runs it on a script."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyImages, tiny_convnext, tiny_vit

from hf_lgp import LGPTrainingArguments, cli
from hf_lgp.probe import ProbeReport, probe


def arguments(folder: Path, **changed: Any) -> LGPTrainingArguments:
    settings = {"use_cpu": True, "per_device_train_batch_size": 16, "report_to": "none", **changed}
    return LGPTrainingArguments(str(folder / "out"), **settings)


def data(labels: int = 3) -> TinyImages:
    return TinyImages(64, dtype=torch.float32, labels=labels)


# -- reports -----------------------------------------------------------------------------------------------------------

FOUND = ProbeReport(0.25, 0.02, {1.0: 0.9, 0.5: 0.7, 0.25: 0.5}, 0.1, True, 1.1)


def test_prices_are_variances_times_step_times() -> None:
    assert FOUND.prices == pytest.approx({1.0: 0.9, 0.5: 0.7 * 1.02, 0.25: 0.5 * 1.06})
    assert FOUND.best(1.1) == 0.25 and FOUND.best(1.05) == 0.5 and FOUND.best(1.01) == 1.0


def test_verdicts() -> None:
    assert "0.25 of every batch a step takes 0.50" in FOUND.verdict and "about 0.53" in FOUND.verdict
    wider = ProbeReport(1.0, 0.2, {1.0: 0.9, 0.25: 0.4}, 0.1, True, 1.1)
    assert "raise `lgp_variance_budget` above 1.60" in wider.verdict and "exact steps take 0.90" in wider.verdict
    assert "do not pay" in ProbeReport(1.0, 0.9, {1.0: 1.0, 0.25: 0.9}, 0.1).verdict
    assert str(ProbeReport(refused="it is a pudding")) == "LGPTrainer would train this model exactly: it is a pudding."


def test_a_table_has_a_line_for_each_fraction() -> None:
    head, *rows = str(FOUND).splitlines()
    assert head.split() == ["control", "fraction", "step", "time", "variance", "price"]
    assert [row.split() for row in rows[:3]] == [
        ["1", "0.90", "1.000", "0.90"],
        ["0.5", "0.70", "1.020", "0.71"],
        ["0.25", "0.50", "1.060", "0.53", "<-", "chosen"],
    ]
    assert any("variance explained  98.0%" in row for row in rows) and any("one row" in row for row in rows)
    assert rows[-1] == FOUND.verdict


def test_a_slow_data_loader_comes_first() -> None:
    assert not FOUND.input_bound and "Input-bound" not in FOUND.verdict
    waiting = replace(FOUND, loader_seconds=0.06)  # a predicted step takes 0.05
    assert waiting.verdict.startswith("Input-bound: the data loader is slower than the step.")
    assert FOUND.verdict in waiting.verdict


class Slow(TinyImages):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return super().__getitem__(index)


def test_waiting_for_data_is_measured(tmp_path: Path) -> None:
    report = probe(tiny_vit(torch.float32), Slow(64, dtype=torch.float32, labels=3), arguments(tmp_path))
    assert report.loader_seconds >= 0.16, "sixteen images, each of which takes 0.01 s"


# -- dry runs ----------------------------------------------------------------------------------------------------------


def test_it_measures_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model, args = tiny_vit(torch.float32, dropout=0.1), arguments(tmp_path)
    before, given = {name: value.clone() for name, value in model.state_dict().items()}, args.to_dict()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(4), np.random.rand(4)
    torch.manual_seed(3)
    np.random.seed(3)
    report = probe(model, data(), args)
    assert report.refused is None and report.first_row == (report.step_times[1.0] < 1.0)
    assert set(report.step_times) == set(report.prices) == {1.0, 0.5, 0.25, 0.125}, "two control examples at least"
    assert 0.0 < report.residual_share < 1.0 and report.exact_seconds > 0.0 and report.budget == 1.1
    assert report.fraction in report.step_times
    assert (torch.rand(4) == expected[0]).all() and (np.random.rand(4) == expected[1]).all()
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert args.to_dict() == given and not (tmp_path / "out").exists()


def test_accumulation_and_plain_arguments_default(tmp_path: Path) -> None:
    report = probe(tiny_vit(torch.float32), data(), arguments(tmp_path, gradient_accumulation_steps=3, warmup_steps=2))
    assert report.refused is None and report.residual_share < 1.0


def test_the_linear_predictor_is_probed_once_it_has_learnt(tmp_path: Path) -> None:
    report = probe(tiny_convnext(), data(), arguments(tmp_path, lgp_predictor="linear", lgp_window=64))
    assert report.refused is None and not report.first_row and 0.25 in report.step_times


def test_a_refused_model_is_reported_whatever_the_predictor(tmp_path: Path) -> None:
    for predictor in ("auto", "rows"):
        report = probe(tiny_convnext(), data(), arguments(tmp_path, lgp_predictor=predictor))
        assert report.refused is not None and report.refused in str(report)


def test_batches_of_one_and_impossible_models_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        probe(tiny_vit(torch.float32), data(), arguments(tmp_path, per_device_train_batch_size=1))
    model = tiny_vit(torch.float32)
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        probe(model, data(), arguments(tmp_path))


def test_a_compute_loss_takes_the_place_of_trainers(tmp_path: Path) -> None:
    called = []

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        called.append(return_outputs)
        return model(**inputs).loss * 2

    probe(tiny_vit(torch.float32), data(), arguments(tmp_path), compute_loss=compute_loss)
    assert len(called) > 20


# -- the command -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from tiny import TinyImages, tiny_vit
from transformers import Trainer, TrainingArguments

class Doubled(Trainer):
    def __init__(self, factor, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.factor * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

class Mine(TinyImages):
    pass

if __name__ == "__main__":
    workers = dict(dataloader_num_workers=1, dataloader_multiprocessing_context="spawn") if "--spawn" in sys.argv else {}
    args = TrainingArguments(sys.argv[1], per_device_train_batch_size=16, use_cpu=True, report_to="none", **workers)
    trainer = Doubled(2.0, tiny_vit(torch.float32), args, train_dataset=Mine(2048 if workers else 64, dtype=torch.float32))
    if "--never" not in sys.argv:
        trainer.train()
        raise AssertionError("training went on")
"""


def test_a_script_is_probed_where_it_would_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert cli.main(["probe", str(script), str(tmp_path / "out")]) == 0
    assert "control fraction" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/*"))
    assert cli.main(["probe", str(script), str(tmp_path / "out"), "--never"]) == 1
    assert "without calling" in capsys.readouterr().err


def test_workers_that_import_the_script_anew_find_what_it_defines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert cli.main(["probe", str(script), str(tmp_path / "out"), "--spawn"]) == 0
    assert "control fraction" in capsys.readouterr().out


def test_a_missing_script_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["probe", "nowhere.py"])
    assert "nowhere.py: there is no such file" in capsys.readouterr().err
