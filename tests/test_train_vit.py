"""The example script: its data paths and messages on tiny made data, and one run from the command line to a checkpoint."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared
import torch
import train_vit
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors import safe_open
from train_vit import DataArguments, ImageTensors, InputError, LabelledImages, ModelArguments, load_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, pipeline

from hf_lgp import LGPTrainer

SIZES = "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 4 --use_cpu --disable_tqdm true"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed: int, size: tuple[int, int] = (10, 8), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(seed: int) -> bytes:
    buffer = BytesIO()
    picture(seed).save(buffer, format="png")
    return buffer.getvalue()


def made_rows(count: int = 20, image: str = "img", label: str = "label", classes: int = 2) -> Dataset:
    features = Features({image: ImageFeature(), label: ClassLabel(names=["cat", "dog", "owl"][:classes])})
    rows = {image: [picture(i) for i in range(count)], label: [i % classes for i in range(count)]}
    return Dataset.from_dict(rows, features=features)


def made_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 5) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            picture(10 * number + index).save(root / name / f"{index}.png")
    return root


def labelled(rows: Dataset, **arguments: Any) -> LabelledImages:
    return LabelledImages.from_rows(rows, shared.class_names(rows, "label"), DataArguments(**arguments), "training")


# -- data ----------------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_the_same_way_every_time() -> None:
    train, held_out, names = load_images(DataArguments())
    again, _, _ = load_images(DataArguments())
    assert (len(train), len(held_out), names) == (1437, 360, [str(digit) for digit in range(10)])
    assert set(train.chosen).isdisjoint(held_out.chosen)
    assert (train.chosen == again.chosen).all()
    assert np.bincount(held_out.labels[held_out.chosen]).min() >= 34


def test_parquet_files(tmp_path: Path) -> None:
    made_rows(20).to_parquet(str(tmp_path / "train.parquet"))
    made_rows(6).to_parquet(str(tmp_path / "test.parquet"))
    arguments = DataArguments(
        train_file=str(tmp_path / "train.parquet"),
        validation_file=str(tmp_path / "test.parquet"),
        max_train_samples=12,
        max_eval_samples=100,
    )
    train, held_out, names = load_images(arguments)
    assert (len(train), len(held_out), names) == (12, 6, ["cat", "dog"])
    assert np.array_equal(np.asarray(held_out.decode(3)), np.asarray(picture(3)))
    assert held_out.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_parquet_without_declared_features(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": png(i), "path": None} for i in range(10)]
    table = pyarrow.table({"image": images, "labels": ["b", "a"] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    train, held_out, names = load_images(DataArguments(train_file=str(tmp_path / "train.parquet")))
    assert (len(train), len(held_out), names) == (8, 2, ["a", "b"])
    assert train.labels.tolist() == [1, 0] * 5
    assert train.decode(0).size == (10, 8)


def test_image_folders_number_classes_alike(tmp_path: Path) -> None:
    arguments = DataArguments(
        train_dir=str(made_folder(tmp_path / "train")),
        validation_dir=str(made_folder(tmp_path / "test", ("dog",), each=2)),
    )
    train, held_out, names = load_images(arguments)
    assert (len(train), len(held_out), names) == (10, 2, ["cat", "dog"])
    assert held_out.labels.tolist() == [1, 1]


def test_classes_are_matched_by_name() -> None:
    rows = Dataset.from_dict(
        {"label": [0, 1]}, features=Features({"label": ClassLabel(names=["dog", "cat"])})
    )  # numbered the other way round
    assert shared.class_ids(rows, "label", ["cat", "dog"], "held-out").tolist() == [1, 0]


def test_integers_are_classes_in_numerical_order() -> None:
    rows = Dataset.from_dict({"label": [10, 9, 10]})
    names = shared.class_names(rows, "label")
    assert names == ["9", "10"]
    assert shared.class_ids(rows, "label", names, "training").tolist() == [1, 0, 1]


# -- messages ------------------------------------------------------------------------------------------------------------


def test_unknown_columns_are_listed() -> None:
    rows = made_rows(image="photo", label="kind")
    with pytest.raises(
        InputError, match=r"named image or img\. The columns found are: photo, kind.*--image_column_name"
    ):
        shared.find_column(rows, None, train_vit.IMAGE_COLUMNS, "--image_column_name")
    with pytest.raises(InputError, match=r"--label_column_name breed: .* no such column.*photo, kind"):
        shared.find_column(rows, "breed", train_vit.LABEL_COLUMNS, "--label_column_name")
    assert shared.find_column(rows, "kind", train_vit.LABEL_COLUMNS, "--label_column_name") == "kind"


def test_images_without_sub_folders_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture(0).save(tmp_path / "train" / "0.png")
    with pytest.raises(InputError, match=r"columns found are: image\..*one sub-folder per class"):
        load_images(DataArguments(train_dir=str(tmp_path / "train")))


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_missing_files_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=rf"--train_{kind} .*nowhere: there is no such"):
        load_images(DataArguments(**{f"train_{kind}": str(tmp_path / "nowhere")}))


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="Cannot load the parquet files"):
        load_images(DataArguments(train_file=str(tmp_path / "train.parquet")))


def test_unreadable_image_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "train")
    (folder / "dog" / "3.png").write_bytes(b"no image")
    train, held_out, _ = load_images(DataArguments(train_dir=str(folder)))
    processor = train_vit.ViTImageProcessor(size={"height": 8, "width": 8})
    with pytest.raises(
        InputError, match=r"row 8 of the training data \(.*3\.png\).*Replace the image or remove the row"
    ):
        for part in (train, held_out):
            ImageTensors(part, processor)


@pytest.mark.parametrize("broken", [b"no image", png(0)[:60], b""])
def test_unreadable_bytes_are_named_by_row(broken: bytes) -> None:
    rows = Dataset.from_dict(
        {"image": [{"bytes": png(0), "path": None}, {"bytes": broken, "path": None}], "label": ["a", "b"]},
        features=Features({"image": ImageFeature(decode=False), "label": Value("string")}),
    )
    images = labelled(rows)
    assert images.decode(0).mode == "RGB"
    with pytest.raises(InputError, match="row 1 of the training data"):
        images.decode(1)


def test_rows_without_label_or_with_a_new_class() -> None:
    rows = Dataset.from_dict({"label": ["a", None]})
    with pytest.raises(InputError, match="Row 1 of the training data has no label"):
        shared.class_ids(rows, "label", ["a", "b"], "training")
    rows = Dataset.from_dict({"label": ["a", "c"]})
    with pytest.raises(InputError, match="Row 1 of the held-out data is of class c"):
        shared.class_ids(rows, "label", ["a", "b"], "held-out")


def test_columns_of_the_wrong_kind() -> None:
    rows = Dataset.from_dict({"image": [1, 2], "label": [0.5, 1.5]})
    with pytest.raises(InputError, match="not classes"):
        shared.class_names(rows, "label")
    with pytest.raises(InputError, match="not images"):
        LabelledImages.from_rows(
            Dataset.from_dict({"image": [1, 2], "label": [0, 1]}), ["0", "1"], DataArguments(), "training"
        )
    with pytest.raises(InputError, match=r"1 class\(es\)"):
        shared.class_names(Dataset.from_dict({"label": ["a", "a"]}), "label")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_dir": "a", "train_file": "b"}, "--train_dir and --train_file"),
        ({"validation_file": "b"}, "needs --train_file"),
        ({"train_val_split": 1.0}, "--train_val_split"),
        ({"max_eval_samples": 0}, "--max_eval_samples"),
        ({"random_crop_padding": -1}, "--random_crop_padding"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataArguments(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"image_size": 10, "patch_size": 4}, "tile"), ({"hidden_size": 10}, "--num_attention_heads 4")],
)
def test_sizes_that_do_not_fit(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_vit.build_model(ModelArguments(**wrong), ["a", "b"], picture(0, (8, 8)))


def test_resuming_from_nothing(tmp_path: Path) -> None:
    for wanted, message in ((str(tmp_path / "nowhere"), "no such folder"), ("true", "no checkpoint")):
        *_, arguments = shared.parse(
            (ModelArguments, DataArguments),
            ["--output_dir", str(tmp_path), "--resume_from_checkpoint", wanted, "--use_cpu"],
        )
        with pytest.raises(InputError, match=message):
            shared.resume_point(arguments)


# -- tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_bytes", [0, train_vit.KEEP_BYTES], ids=["decoded on each visit", "kept"])
def test_pixels_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch, keep_bytes: int) -> None:
    monkeypatch.setattr(train_vit, "KEEP_BYTES", keep_bytes)
    images = labelled(made_rows(6))
    processor = train_vit.ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.1, 0.2, 0.3])
    tensors = ImageTensors(images, processor)
    expected = processor([images.decode(i) for i in range(6)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.stack([tensors[i]["pixel_values"] for i in range(6)]), expected)
    assert [int(example["labels"]) for example in tensors.__getitems__([3, 0])] == [1, 0]


def test_random_crops_shift_every_image_by_itself() -> None:
    pixels = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    crops = train_vit.random_crop(pixels, 2)
    assert crops.shape == pixels.shape and crops.dtype == pixels.dtype
    padded = torch.nn.functional.pad(pixels, (2,) * 4)
    seen = set()
    for image, crop in zip(padded, crops, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(image[:, i : i + 6, j : j + 5], crop)]
        assert len(fits) == 1  # the bytes are random and not 0, so only one place fits
        seen.update(fits)
    assert len(seen) > 10


def test_random_flips_mirror_some_images() -> None:
    pixels = torch.rand(64, 3, 4, 4)
    flipped = train_vit.random_flip(pixels)
    same = (flipped == pixels).flatten(1).all(1)
    mirrored = (flipped == pixels.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 10 < same.sum() < 54


# -- the run -------------------------------------------------------------------------------------------------------------


def test_readings_are_the_last_ones_logged() -> None:
    history = [{"lgp/fraction": 0.5, "lgp/variance": 1.1}, {"lgp/fraction": 0.25, "loss": 2.0}, {"eval_loss": 1.0}]
    assert shared.last_readings(history) == {"fraction": 0.25, "variance": 1.1}
    assert shared.last_readings([{"loss": 1.0}]) == {}


def test_from_the_command_line_to_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run = (
        f"--output_dir {out} {SIZES} --max_steps 6 --per_device_train_batch_size 16 --logging_steps 2 "
        "--max_train_samples 64 --max_eval_samples 40 --lgp_control_fraction 0.25 --save_steps 3"
    )
    metrics = train_vit.main(run.split())
    assert 0.0 <= metrics["eval_accuracy"] <= 1.0
    printed = capsys.readouterr().out
    assert str(out) in printed and "of 40 images" in printed
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert (
        shared.last_readings(history)["fraction"] == 0.25 and "exact gradients         0.25 of every batch" in printed
    )

    with safe_open(out / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    model = AutoModelForImageClassification.from_pretrained(out)
    assert saved and not any("lgp" in name for name in saved)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert sum(parameter.numel() for parameter in model.parameters()) == count_saved(out)

    train, held_out, _ = load_images(DataArguments(max_eval_samples=40))
    processor = AutoImageProcessor.from_pretrained(out)
    classify = pipeline("image-classification", model=str(out), device="cpu")
    pixels = ImageTensors(held_out, processor)[0]["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels[None]).logits.softmax(-1)[0]
    [first, *_] = classify(held_out.decode(0).convert("L"))
    assert first["label"] == str(int(expected.argmax())) and first["score"] == pytest.approx(
        float(expected.max()), abs=1e-5
    )
    assert len(train) == 1437
    assert {"train_results.json", "eval_results.json", "trainer_state.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }


def test_resuming_hands_the_checkpoint_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether weights and states come back is the trainer's business, so the trainer is left out.
    class Resumed(Exception):
        pass

    def train(self: Trainer, resume_from_checkpoint: str | bool | None) -> None:
        raise Resumed(resume_from_checkpoint)

    monkeypatch.setattr(LGPTrainer, "train", train)
    (tmp_path / "checkpoint-2").mkdir()
    run = (
        f"--output_dir {tmp_path} {SIZES} --max_train_samples 16 --max_eval_samples 8 --resume_from_checkpoint".split()
    )
    for wanted, expected in (("true", True), (str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-2"))):
        with pytest.raises(Resumed) as passed:
            train_vit.main([*run, wanted])
        assert passed.value.args == (expected,)


def count_saved(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())


def test_fine_tuning_replaces_the_head_and_can_be_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    sizes = ModelArguments(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    for part in train_vit.build_model(sizes, ["a", "b", "c"], picture(0)):
        part.save_pretrained(base)
    made_rows(20).to_parquet(str(tmp_path / "train.parquet"))
    trainers: list[Trainer] = []
    monkeypatch.setattr(shared, "report", lambda trainer, *_: trainers.append(trainer))
    train_vit.main(
        f"--output_dir {tmp_path / 'out'} --model_name_or_path {base} --train_file {tmp_path / 'train.parquet'} "
        "--trainer exact --max_steps 1 --use_cpu --disable_tqdm true --save_strategy no".split()
    )
    [trainer] = trainers
    assert not isinstance(trainer, LGPTrainer)
    assert trainer.model.config.id2label == {0: "cat", 1: "dog"}
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").classifier.out_features == 2


@pytest.mark.parametrize(
    ("flags", "trains", "evaluates"),
    [
        ("", True, True),
        ("--eval_strategy epoch", True, True),
        ("--eval_strategy epoch --do_eval", True, True),
        ("--do_eval", False, True),
        ("--do_train", True, False),
    ],
)
def test_it_trains_unless_it_is_told_only_to_evaluate(
    flags: str, trains: bool, evaluates: bool, tmp_path: Path
) -> None:
    command = ["--output_dir", str(tmp_path), "--use_cpu", *flags.split()]
    args = shared.parse((ModelArguments, DataArguments), command)[-1]
    assert (args.do_train, args.do_eval) == (trains, evaluates)
