"""The benchmarks run, at smoke size: what they measure is for real runs to say."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import every_architecture  # noqa: E402
import finetune_text  # noqa: E402
import gpu_check  # noqa: E402
import predictability  # noqa: E402
import small_models  # noqa: E402
import step_cost  # noqa: E402
import tables  # noqa: E402
import versions  # noqa: E402
from accuracy_summary import summarise  # noqa: E402
from accuracy_tasks import Task  # noqa: E402
from common import build_vit, environment, random_images, thinned, write_json  # noqa: E402
from infobatch import epoch_of  # noqa: E402
from time_to_accuracy import argument_parser, run_cell  # noqa: E402

from hf_lgp.attention_interface import intercepted_attention  # noqa: E402
from hf_lgp.control.plan import StepPlan  # noqa: E402
from hf_lgp.methods import row_walk  # noqa: E402
from hf_lgp.rows.walk import RowBudget  # noqa: E402

VIT = "digits-tiny"
BUDGET = RowBudget(2, 1)


def digits_like(count: int) -> Task:
    pixels, labels = random_images(VIT, count)
    images = (pixels * 40 + 128).clamp(0, 255).to(torch.uint8)
    return Task((images, labels), (images, labels), lambda seed: build_vit(VIT, seed=seed), augment=False)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    arguments = f"--vit {VIT} --batch 16 --epochs 4 --images 64 --eval-points 4 --cpu --seeds 0"
    options = argument_parser("", ["scratch"]).parse_args(arguments.split())
    cells = [run_cell(options, digits_like(64), arm, 0) for arm in ("trainer", "lgp", "quarter", "compressed")]
    settings = {name: getattr(options, name) for name in ("task", "vit", "images", "epochs", "bf16")}
    return {
        "settings": settings,
        "summary": summarise(cells, [1, 2], options.epochs, options.batch),
        "cells": cells,
        "environment": environment(torch.device("cpu")),
    }


def test_arms_train_and_count_their_steps(result: dict[str, Any]) -> None:
    plain, automatic, quarter, _ = result["cells"]
    assert plain["micro_batches"] is None
    assert sum(automatic["micro_batches"].values()) == 16
    assert quarter["micro_batches"] == {"exact": 0, "predicted": 16}
    for cell in result["cells"][:3]:
        assert cell["steps"] == 16 and [point["step"] for point in cell["curve"]] == [0, 4, 8, 12, 16]
        assert len(cell["log"]) <= 32
        assert cell["curve"][0]["accuracy"] == plain["curve"][0]["accuracy"]
    assert quarter["log"][-1]["lgp/fraction"] == 0.25


def small_rows(*arguments: str) -> dict[str, Any]:
    options = every_architecture.argument_parser().parse_args(["--batch", "4", *arguments])
    found = {}
    for name in ("vit", "resnet"):
        model = small_models.build("image", transformers.CONFIG_MAPPING[name], name)
        found[f"image: {name}"] = every_architecture.measured(model, model.config, "image", options)
    return found


def test_an_architecture_is_measured_or_refused_with_a_reason() -> None:
    rows = small_rows("--steps", "3", "--rounds", "1")
    assert "calls attention neither by" in rows["image: resnet"]["exact_because"]
    vit = rows["image: vit"]
    assert vit["first_row"] and vit["blocks"] == [4] and vit["bias"] < 1e-10
    assert 0.5 < vit["explained"]["0"]["weighted"] < vit["explained"]["2"]["weighted"] and vit["price"] > 0.0


@pytest.mark.parametrize("reads", ["image", "video", "audio", "sequence"])
def test_tasks_of_small_models_can_be_told_apart(reads: str) -> None:
    """The mean example of a class is nearer to other examples of it than that of another class."""
    config = SimpleNamespace(model_type="audio-spectrogram-transformer" if reads == "audio" else "")
    known, new = (small_models.examples_of(reads, config, 400, seed) for seed in (0, 1))
    name = next(iter(known))

    def features(examples: dict[str, Any]) -> torch.Tensor:
        values = examples[name]
        if reads == "sequence":
            return torch.nn.functional.one_hot(values, 256)[..., 44:].float().mean(1)
        return torch.fft.fft2(values.float()).abs().flatten(1) if reads != "audio" else values.mean(1)

    means = torch.stack([features(known)[known["labels"] == k].mean(0) for k in range(small_models.CLASSES)])
    guessed = torch.cdist(features(new), means).argmin(1)
    assert float((guessed == new["labels"]).float().mean()) > 0.5


def test_tables_are_drawn_from_whatever_is_there(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    makes = [make for makes in tables.TABLES.values() for make in makes]
    assert [make() for make in makes] == [None] * len(makes)
    runs = [{"trainer": 2.0, "old": 1.0, "new": 0.5}] * 2
    settings = {"vit": VIT, "batch": 16, "fraction": 0.25}
    write_json(tmp_path / "time_to_accuracy_scratch_fp32.json", result)
    write_json(tmp_path / "no_gain_tiny.json", result)
    cells = [result["cells"][0], {**result["cells"][2], "arm": "noise"}]
    noisy = {**result, "cells": cells, "summary": summarise(cells, [1, 2], 4, 16)}
    write_json(tmp_path / "noise_tiny.json", noisy)
    write_json(tmp_path / "versions_tiny.json", {"settings": settings, "summary": versions.summary(runs)})
    write_json(tmp_path / "step_cost_tiny_cpu.json", step_cost.measure(VIT, 16, [0.25], 1))
    model, examples = vit_and_examples()
    measured = {"settings": {"vit": VIT}, "steps": {"0": predictability.measure(model, examples, [BUDGET])}}
    write_json(tmp_path / "predictability.json", measured)
    figures = {"eager": {"lgp": 0.7}, "compiled": {"lgp": 0.6}, "peak_memory": 0.5}
    on_paper = {"gpus": {"T4": {"32": figures}}, "assumed": {"T4": {"dtype": "fp16"}}, "settings": {"vit": VIT}}
    on_paper["launches"] = {"exact": 900, "predicted": 2000, "measuring": 5000}
    write_json(tmp_path / "paper_cost_tiny.json", on_paper)
    small = {"rows": small_rows("--steps", "2", "--rounds", "1")}
    write_json(tmp_path / "architectures_tiny.json", small)
    write_json(tmp_path / "seeds_of_architectures.json", small)
    cells = [
        {"task": "r8", "arm": a, "seed": s, "seconds": 1.0 + s, "accuracy": 0.5}
        for a in ("trainer", "lgp")
        for s in (0, 1)
    ]
    write_json(tmp_path / "finetune_text.json", {"summary": finetune_text.summary(cells)})
    drawn = [make() for make in makes]
    assert None not in drawn
    assert "a quarter exact | 1 | 100% |" in "".join(drawn)  # type: ignore[arg-type]
    assert "0.50 of the version before" in "".join(drawn)  # type: ignore[arg-type]

    for name in tables.TABLES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{tables.START}\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--write"])
    tables.main()
    written = (tmp_path / "README.md").read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written.split("| ---")[0]
    assert drawn[0] in written


def test_the_check_of_a_gpu_keeps_finished_cells_and_names_those_on_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second call measures nothing more
        gpu_check.main(["--smoke", "--output", str(tmp_path)])
        monkeypatch.setattr(step_cost, "measure", lambda *_: pytest.fail("measured again"))
    assert "cifar-0.8m, batch 32: exact " in capsys.readouterr().out
    assert gpu_check.paper("NVIDIA H200") == "H100" and gpu_check.paper("NVIDIA L4") == "L4"
    assert gpu_check.beside_paper("vit-base-16", 32, "NVIDIA A100-SXM4") is not None
    assert gpu_check.beside_paper("vit-base-16", 32, "unheard of") is None


def test_a_step_is_split_into_its_parts() -> None:
    result = step_cost.measure(VIT, 32, [0.5, 0.25], 2)
    steps = result["steps"]
    assert result["one_row"] and result["rows"] == 17
    assert {"exact", "exact, last block on one row", "f = 0.5", "f = 0.25", "exact, measuring"} <= set(steps)
    assert steps["exact"]["cost"] == 1.0
    figures = steps["f = 0.25"]
    assert figures["kappa"] == pytest.approx((figures["cost"] - 0.25) / 0.75)
    assert all(figures[part] > 0 for part in ("others", "control"))


def vit_and_examples() -> tuple[Any, dict[str, torch.Tensor]]:
    pixels, labels = random_images(VIT, 6)
    return build_vit(VIT).eval(), {"pixel_values": pixels, "labels": labels}


def test_predictions_of_single_examples_are_compared_tensor_by_tensor() -> None:
    model, examples = vit_and_examples()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    budgets = [RowBudget(1), RowBudget(1, 6), RowBudget(16)]
    measured = predictability.measure(model, examples, budgets)
    assert measured["last_block_on_one_row"]
    for budget in budgets:
        for kind in ("explained", "squared_correlation"):
            figures = measured[predictability.label(budget)][kind]
            assert figures["by_part"]["block 1"] == pytest.approx(1.0, abs=1e-4)  # exact
            assert figures["by_part"]["final norm"] == pytest.approx(1.0, abs=1e-4)
            assert figures["worst"] <= figures["mean"] <= 1.0
    few, single, many = (measured[predictability.label(budget)]["explained"]["weighted"] for budget in budgets)
    assert 0.3 < few < single < 1.0 and few < many


def test_predictions_of_single_examples_are_what_a_step_takes() -> None:
    model, examples = vit_and_examples()
    two = {name: value[:2] for name, value in examples.items()}
    method = row_walk(
        model, lambda n: model(**{k: v[:n] for k, v in two.items()}).loss, 2, BUDGET, intercepted_attention, False
    )
    with method.splice(StepPlan(0.5, first_row=True), lambda _: None):
        model(**two).loss.backward()
    each = [{name: value[i : i + 1] for name, value in two.items()} for i in range(2)]
    exact = [predictability.exact_gradients(model, one) for one in each]
    predicted = [predictability.predicted_gradients(model, method, one, [BUDGET])[BUDGET] for one in each]
    differences = []
    for a, b in ((0, 1), (1, 0)):  # which of them was the control example is drawn
        of_step = {n: (2 * g - predicted[a][n] + predicted[b][n]) / 2 for n, g in exact[a].items()}
        differences.append(max(float((p.grad - of_step[n]).abs().max()) for n, p in model.named_parameters()))
    assert min(differences) < 1e-5 < max(differences)


def test_moments_are_variances_and_covariances() -> None:
    g, h = torch.randn(2, 50, 3, dtype=torch.float64)
    h = g + 0.5 * h
    moments = predictability.Moments()
    for one, other in zip(g, h, strict=True):
        moments.add(one, other)
    variance, explained, correlation = moments.figures()
    of_g, of_h = g - g.mean(0), h - h.mean(0)
    assert variance == pytest.approx(float(g.var(0).sum()))
    assert explained == pytest.approx(1.0 - float((g - h).var(0).sum()) / variance)
    assert correlation == pytest.approx(float((of_g * of_h).sum() ** 2 / (of_g.square().sum() * of_h.square().sum())))


def test_whole_steps_are_timed() -> None:
    options = argparse.Namespace(vit=VIT, batch=8, warmup=1, steps=2, turns=0.0)
    for settings in ({}, {"lgp_control_fraction": 0.25}):
        assert versions.seconds_per_step(options, settings) > 0


@pytest.mark.parametrize(
    "script", sorted(path.name for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text())
)
def test_help_of(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        __import__(script[:-3]).main()
    assert left.value.code == 0 and "usage" in capsys.readouterr().out


def test_result_files_are_summaries(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"runs": [{"x": 1 / 3, 2: [0.1, None]}], "none": {}, "flag": True})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "runs": [{"x": 0.333333, "2": [0.1, None]}],
        "none": {},
        "flag": True,
    }
    assert thinned(list(range(100)), 4) == [24, 49, 74, 99] and thinned([1, 2]) == [1, 2] and thinned([]) == []
    listing = subprocess.run(
        ["git", "ls-files", "results"], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    sizes = [(BENCHMARKS / name).stat().st_size for name in listing.stdout.split() if (BENCHMARKS / name).is_file()]
    assert sum(sizes) < 1_000_000


def test_infobatch_leaves_out_what_is_learnt_and_keeps_the_expected_weight() -> None:
    losses = torch.tensor([0.1] * 50 + [3.0] * 50)
    draw = torch.Generator().manual_seed(0)
    epochs = [dict(epoch_of(losses, draw, 0.5)) for _ in range(400)]
    assert all(set(range(50, 100)) <= set(epoch) for epoch in epochs) and {len(epoch) for epoch in epochs} != {100}
    mean = [sum(epoch.get(i, 0.0) for epoch in epochs) / len(epochs) for i in range(100)]
    assert mean[50:] == [1.0] * 50 and sum(mean[:50]) / 50 == pytest.approx(1.0, abs=0.02)
    assert len(epoch_of(torch.full((9,), torch.inf), draw, 0.5)) == 9, "what was not seen stays"
    assert len(epoch_of(losses, draw, 0.0)) == 100


def test_baselines_in_other_time_have_their_own_steps_and_batches() -> None:
    options = argument_parser("", ["scratch"]).parse_args(
        f"--vit {VIT} --batch 16 --epochs 4 --images 64 --eval-points 2 --cpu".split()
    )
    cells = {arm: run_cell(options, digits_like(64), arm, 0) for arm in ("compressed", "small-batch", "infobatch")}
    assert {arm: (cell["steps"], cell["batch"]) for arm, cell in cells.items()} == {
        "compressed": (8, 16),
        "small-batch": (33, 4),
        "infobatch": (8, 16),
    }
