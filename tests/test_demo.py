"""The demo trains twice, and says what came out, also when nothing can be said."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
import torch
from tiny import tiny_vit


def run(name: str, seconds: list[float], accuracy: float = 0.9) -> demo.Run:
    return demo.Run(name, seconds, [0.5, accuracy], 0.8 * (name == "LGPTrainer"), 0.7 * (name == "LGPTrainer"))


def test_the_table_has_a_line_for_each_run() -> None:
    head, plain, mine = demo.table([run("Trainer", [10.0, 10.0]), run("LGPTrainer", [7.0, 5.0])]).splitlines()
    assert head.split() == "training time held-out accuracy predicted steps gradients backpropagated".split()
    assert plain.split() == ["Trainer", "20", "s", "90.0%", "0%", "100%"]
    assert mine.split() == ["LGPTrainer", "12", "s", "90.0%", "80%", "30%"]


def test_the_verdict_compares_run_by_run() -> None:
    runs = [run("Trainer", [10.0, 10.0]), run("Trainer", [10.0, 10.0]), run("LGPTrainer", [7.0, 5.0], 0.91)]
    said = demo.verdict([*runs, run("LGPTrainer", [7.0, 7.0])])
    assert "took 0.65 of Trainer's time (0.60 to 0.70 in 2 repeats)" in said and "+0.5 points" in said
    assert "noisy" not in said


def test_a_noisy_machine_is_not_trusted() -> None:
    said = demo.verdict([run("Trainer", [9.0, 8.0, 14.0]), run("LGPTrainer", [7.0, 7.0, 9.0])])
    assert "too noisy to tell" in said and "--repeats 3" in said
    assert "noisy" not in demo.verdict([run("Trainer", [9.0, 9.1, 9.0]), run("LGPTrainer", [7.0, 7.0, 7.0])])
    assert "Too few epochs" in demo.verdict([run("Trainer", [9.0]), run("LGPTrainer", [7.0])])


def test_every_fifth_digit_is_held_out() -> None:
    train, held_out = (demo.Digits(held_out) for held_out in (False, True))
    assert (len(train), len(held_out)) == (4000, 1000)
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert train[0]["pixel_values"].shape == (1, 28, 28) and -1.0 <= train.pixels.min() < train.pixels.max() <= 1.0


def test_it_trains_with_both_and_leaves_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Few(demo.Digits):
        def __init__(self, held_out: bool) -> None:
            super().__init__(held_out)
            self.pixels, self.labels = self.pixels[::20], self.labels[::20]

    monkeypatch.setattr(demo, "Digits", Few)
    monkeypatch.setattr(demo, "model", lambda: tiny_vit(torch.float32, image_size=28, patch_size=7, num_labels=10))
    plain, mine = demo.main(["--output_dir", str(tmp_path / "demo"), "--epochs", "2"])
    assert (plain.trainer, mine.trainer) == ("Trainer", "LGPTrainer") and len(mine.accuracies) == 2
    assert plain.accuracies[0] == pytest.approx(mine.accuracies[0], abs=0.1), "the same batches"
    assert {"comparison.png", "model.safetensors"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    assert "LGPTrainer took" in capsys.readouterr().out
