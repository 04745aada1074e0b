# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "hf-lgp[examples]",
# ]
#
# [tool.uv.sources]
# hf-lgp = { path = "..", editable = true }
# ///
"""Train or fine-tune an image classifier with predicted gradients.

Without a data set on the command line this trains a small ViT from scratch on the handwritten digits that come with
scikit-learn: no network, no download.

    python examples/train_vit.py --output_dir outputs/digits --num_train_epochs 20 --logging_steps 50

CIFAR-10 from parquet files (or from the Hub: ``--dataset_name uoft-cs/cifar10``):

    python examples/train_vit.py --train_file train.parquet --validation_file test.parquet --output_dir outputs/cifar10

Fine-tuning on a folder with one sub-folder of images per class:

    python examples/train_vit.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --train_dir flowers/train --validation_dir flowers/test --output_dir outputs/flowers

``--trainer exact`` trains the same way with plain ``transformers.Trainer``. All of ``TrainingArguments`` and the ``lgp_*``
settings are flags as well; without ``--do_train`` and ``--do_eval`` the script does both.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from shared import InputError, accuracy, class_ids, class_names, find_column, parse, resume_point, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_lgp import LGPTrainer

try:
    # Named so that a checkpoint does not depend on whether torchvision is installed where it was trained.
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # Older releases know one ViT processor, and it is the PIL one.
    from transformers import ViTImageProcessor

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

SPLIT_SEED = 0
"""Which rows are held out must not change with ``--seed``, or accuracies of two seeds could not be compared."""

KEEP_BYTES = 2**29
"""Images that take less than this after resizing (CIFAR-10 takes a third) are decoded once and kept in memory."""

_CHUNK = 256
"""Images that are decoded and resized together."""


# -- arguments ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model to train, and with which trainer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to fine-tune: a folder or a name on the Hub. Default: a ViT from scratch."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: eager, sdpa, ... Default: transformers' choice. On a CPU in bf16 try eager."},
    )
    trainer: Literal["lgp", "exact"] = field(
        default="lgp", metadata={"help": "lgp: LGPTrainer, with predicted gradients. exact: transformers.Trainer."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "From scratch: side that images are resized to. Default: that of the first one, at most 224."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "From scratch: side of a patch. Default: an eighth of the image, at most 16."}
    )
    hidden_size: int = field(default=128, metadata={"help": "From scratch: width."})
    num_hidden_layers: int = field(default=6, metadata={"help": "From scratch: number of blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "From scratch: attention heads per block."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "From scratch: width inside the MLPs. Default: four times the width."}
    )
    hidden_dropout_prob: float = field(
        default=0.0, metadata={"help": "From scratch: dropout of embeddings and blocks."}
    )
    attention_probs_dropout_prob: float = field(default=0.0, metadata={"help": "From scratch: dropout of attention."})


@dataclass
class DataArguments:
    """Which images to train on; none named: the digits of scikit-learn."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, held out; goes with --train_dir."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet file with a column of images and one of labels."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, held out; goes with --train_file."})
    image_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the images. Default: {' or '.join(IMAGE_COLUMNS)}."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: {' or '.join(LABEL_COLUMNS)}."}
    )
    train_val_split: float = field(
        default=0.2, metadata={"help": "Share of the training data that is held out where no held-out data are given."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many images."})
    random_crop_padding: int | None = field(
        default=None,
        metadata={
            "help": "Pixels by which training images are shifted at most. Default: an eighth of the image. 0: none."
        },
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={"help": "Flip training images at random, half of them. Default: yes, except for the digits."},
    )

    def __post_init__(self) -> None:
        sources = {"--dataset_name": self.dataset_name, "--train_dir": self.train_dir, "--train_file": self.train_file}
        given = [flag for flag, value in sources.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} name the data twice: keep one of them.")
        for flag in ("dir", "file"):
            if getattr(self, f"validation_{flag}") and not getattr(self, f"train_{flag}"):
                raise InputError(f"--validation_{flag} needs --train_{flag}: it has the classes.")
        if not 0.0 < self.train_val_split < 1.0:
            raise InputError(f"--train_val_split must lie between 0 and 1, got {self.train_val_split}.")
        for flag in ("max_train_samples", "max_eval_samples"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise InputError(f"--{flag} must be at least 1, got {getattr(self, flag)}.")
        if self.random_crop_padding is not None and self.random_crop_padding < 0:
            raise InputError(f"--random_crop_padding must not be negative, got {self.random_crop_padding}.")

    @property
    def is_digits(self) -> bool:
        """Whether no data set was named."""
        return not (self.dataset_name or self.train_dir or self.train_file)


# -- rows --------------------------------------------------------------------------------------------------------------


def digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey images, in columns ``image`` and ``label``."""
    raw = load_digits()
    images = [Image.fromarray(image) for image in np.round(raw.images * (255 / 16)).astype(np.uint8)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in raw.target_names])})
    return Dataset.from_dict({"image": images, "label": raw.target}, features=features)


def load_rows(arguments: DataArguments, cache_dir: str | None = None) -> tuple[Dataset, Dataset | None]:
    """Load the training rows and, if the source has them, the held-out rows.

    Raises:
        InputError: If files are missing or cannot be read.
    """
    if arguments.is_digits:
        return digits(), None
    files: dict[str, str] = {}
    if arguments.dataset_name:
        path, name = arguments.dataset_name, f"the data set {arguments.dataset_name}"
    elif arguments.train_file:
        path, name = "parquet", "the parquet files"
        for split, file in (("train", arguments.train_file), ("validation", arguments.validation_file)):
            if file:
                if not Path(file).is_file():
                    raise InputError(f"--{split}_file {file}: there is no such file.")
                files[split] = file
    else:
        path, name = "imagefolder", "the image folders"
        for split, folder in (("train", arguments.train_dir), ("validation", arguments.validation_dir)):
            if folder:
                if not Path(folder).is_dir():
                    raise InputError(f"--{split}_dir {folder}: there is no such folder.")
                files[split] = os.path.join(folder, "**")
    try:
        splits = load_dataset(path, arguments.dataset_config_name, data_files=files or None, cache_dir=cache_dir)
    except Exception as error:  # Builders raise errors of a dozen kinds; all of them are about the data.
        causes = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
        raise InputError(f"Cannot load {name}: {' '.join(causes)}") from error
    if "train" not in splits:
        raise InputError(f"Cannot train on {name}: it has no split `train`, only {', '.join(splits)}.")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    return splits["train"], splits[held_out] if held_out else None


@dataclass
class LabelledImages:
    """Some rows of a data set: undecoded images and their classes.

    Attributes:
        rows: The whole data set, with one column, of encoded images.
        labels: Class of each row of the whole data set, int64.
        chosen: Numbers of the rows that belong here, so that messages can name a row as its owner counts it.
        where: What the data set is to the user: "training" or "held-out".
    """

    rows: Dataset
    labels: np.ndarray
    chosen: np.ndarray
    where: str

    @classmethod
    def from_rows(cls, rows: Dataset, names: Sequence[str], arguments: DataArguments, where: str) -> LabelledImages:
        """All rows of a data set.

        Raises:
            InputError: If columns are missing or do not hold images and classes.
        """
        image = find_column(rows, arguments.image_column_name, IMAGE_COLUMNS, "--image_column_name")
        label = find_label_column(rows, arguments)
        labels = class_ids(rows, label, names, where)
        rows = rows.select_columns(image)
        if image != "image":
            rows = rows.rename_column(image, "image")
        try:
            rows = rows.cast_column("image", ImageFeature(decode=False))
        except (ValueError, TypeError, NotImplementedError) as error:  # what Arrow raises for casts it cannot do
            raise InputError(
                f"Column `{image}` holds {rows.features['image']}, not images. Name the right one by "
                "--image_column_name."
            ) from error
        return cls(rows, labels, np.arange(len(rows)), where)

    def __len__(self) -> int:
        return len(self.chosen)

    def decode(self, index: int) -> Image.Image:
        """The image at a position of ``chosen``, as ``pipeline`` would read it: upright and RGB.

        Raises:
            InputError: If it cannot be read; the message names row and file.
        """
        row = int(self.chosen[index])
        value = self.rows[row]["image"] or {}
        path = value.get("path")
        try:
            if value.get("bytes") is None and path is None:
                raise ValueError("it is empty")
            with Image.open(path if value["bytes"] is None else BytesIO(value["bytes"])) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"Cannot read the image in row {row} of the {self.where} data{f' ({path})' if path else ''}: {error}. "
                "Replace the image or remove the row."
            ) from error

    def hold_out(self, share: float) -> tuple[LabelledImages, LabelledImages]:
        """Split into training and held-out rows: at random with a fixed seed, stratified by class where that is possible.

        Raises:
            InputError: If there are too few rows.
        """
        labels = self.labels[self.chosen]
        counts, held_out = np.unique(labels, return_counts=True)[1], int(np.ceil(share * len(self)))
        can_stratify = counts.min() >= 2 and min(held_out, len(self) - held_out) >= len(counts)
        try:
            train, rest = train_test_split(
                self.chosen, test_size=share, random_state=SPLIT_SEED, stratify=labels if can_stratify else None
            )
        except ValueError as error:
            raise InputError(f"Cannot hold out {share:.0%} of {len(self)} rows: {error}") from error
        return (
            LabelledImages(self.rows, self.labels, np.sort(train), self.where),
            LabelledImages(self.rows, self.labels, np.sort(rest), self.where),
        )

    def at_most(self, count: int | None) -> LabelledImages:
        """A random choice of ``count`` rows, the same in every run; all if there are fewer or ``count`` is None."""
        if count is None or count >= len(self):
            return self
        chosen = np.random.default_rng(SPLIT_SEED).permutation(self.chosen)[:count]
        return LabelledImages(self.rows, self.labels, chosen, self.where)


def find_label_column(rows: Dataset, arguments: DataArguments) -> str:
    """The column of labels; see :func:`find_column`."""
    hint = " Images in a folder get labels from one sub-folder per class." if arguments.train_dir else ""
    return find_column(rows, arguments.label_column_name, LABEL_COLUMNS, "--label_column_name", hint)


def load_images(
    arguments: DataArguments, cache_dir: str | None = None
) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Load training images, held-out images and class names.

    Raises:
        InputError: If anything about the data has to be changed.
    """
    train_rows, held_out_rows = load_rows(arguments, cache_dir)
    names = class_names(train_rows, find_label_column(train_rows, arguments))
    train = LabelledImages.from_rows(train_rows, names, arguments, "training")
    if held_out_rows is None:
        train, held_out = train.hold_out(arguments.train_val_split)
    else:
        held_out = LabelledImages.from_rows(held_out_rows, names, arguments, "held-out")
    return train.at_most(arguments.max_train_samples), held_out.at_most(arguments.max_eval_samples), names


# -- tensors -----------------------------------------------------------------------------------------------------------


def random_crop(pixels: Tensor, padding: int) -> Tensor:
    """Shift every image by up to ``padding`` pixels each way, filling with black.

    Args:
        pixels: Images, shape ``(n, channels, height, width)``.
        padding: Largest shift.

    Returns:
        Images of the same shape, each a random crop of its padded self.
    """
    count, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count))
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    crops = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns]
    return crops.permute(0, 3, 1, 2).contiguous()


def random_flip(pixels: Tensor) -> Tensor:
    """Mirror each image, shape ``(n, channels, height, width)``, with probability one half."""
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)


class ImageTensors(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images as a model wants them: resized as its processor does, shifted and mirrored at random, normalised.

    Small data sets are decoded and resized once and kept as bytes; larger ones are decoded on every visit
    (``--dataloader_num_workers`` spreads that over processes).

    Args:
        images: Images and labels.
        processor: The model's image processor.
        padding: Largest random shift in pixels; 0 for none.
        flip: Whether to mirror images at random.
    """

    def __init__(self, images: LabelledImages, processor: Any, padding: int = 0, flip: bool = False) -> None:
        self.images, self.processor, self.padding, self.flip = images, processor, padding, flip
        self.labels = torch.from_numpy(images.labels[images.chosen])
        self._kept: Tensor | None = None
        if len(images) * self._resized([0]).numel() <= KEEP_BYTES:
            chunks = torch.arange(len(images)).split(_CHUNK)
            self._kept = torch.cat([self._resized(chunk.tolist()) for chunk in chunks])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """The examples of a whole batch, which the data loader asks for at once: transforms then act on the batch."""
        pixels = self._resized(indices) if self._kept is None else self._kept[indices]
        if self.padding:
            pixels = random_crop(pixels, self.padding)
        if self.flip:
            pixels = random_flip(pixels)
        pixels, labels = self._normalised(pixels), self.labels[indices]
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    def _resized(self, indices: Sequence[int]) -> Tensor:
        decoded = [self.images.decode(index) for index in indices]
        return self.processor(decoded, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]

    def _normalised(self, pixels: Tensor) -> Tensor:
        pixels = pixels.float()
        if self.processor.do_rescale:
            pixels = pixels * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
            pixels = (pixels - mean) / std
        return pixels


# -- model -------------------------------------------------------------------------------------------------------------


def build_model(
    arguments: ModelArguments, names: Sequence[str], first: Image.Image, new_head: bool = True
) -> tuple[PreTrainedModel, Any]:
    """The model to train and its image processor.

    Args:
        arguments: Which model.
        names: Names of the classes.
        first: An image of the data, whose size is the default image size from scratch.
        new_head: Whether a checkpoint's head may be replaced by a fresh one if it has other classes.

    Returns:
        The model and the processor.

    Raises:
        InputError: If sizes do not fit together.
    """
    labels: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if arguments.model_name_or_path:
        source: dict[str, Any] = {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
        model = AutoModelForImageClassification.from_pretrained(
            arguments.model_name_or_path,
            ignore_mismatched_sizes=new_head,
            attn_implementation=arguments.attn_implementation,
            **labels,
            **source,
        )
        return model, AutoImageProcessor.from_pretrained(arguments.model_name_or_path, **source)
    image = arguments.image_size or min(224, max(first.size))
    patch = arguments.patch_size or max(1, min(16, image // 8))
    if image % patch:
        raise InputError(
            f"Patches of side {patch} do not tile images of side {image}: change --patch_size or --image_size."
        )
    if arguments.hidden_size % arguments.num_attention_heads:
        raise InputError(
            f"--hidden_size {arguments.hidden_size} must be a multiple of "
            f"--num_attention_heads {arguments.num_attention_heads}."
        )
    config = ViTConfig(
        image_size=image,
        patch_size=patch,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        intermediate_size=arguments.intermediate_size or 4 * arguments.hidden_size,
        hidden_dropout_prob=arguments.hidden_dropout_prob,
        attention_probs_dropout_prob=arguments.attention_probs_dropout_prob,
        attn_implementation=arguments.attn_implementation,
        **labels,
    )
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": image, "width": image})


# -- the run -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save as the command line says.

    Args:
        arguments: The command line without the program's name; default: that of this process.

    Returns:
        All metrics, ``train_*`` and ``eval_*``.

    Raises:
        InputError: If something in the command or the data has to be changed.
    """
    model_args, data_args, training_args = parse((ModelArguments, DataArguments), arguments)
    checkpoint = resume_point(training_args) if training_args.do_train else None

    logging.basicConfig(format="%(levelname)s: %(message)s", level=training_args.get_process_log_level())
    set_seed(training_args.seed)

    train_images, held_out_images, names = load_images(data_args, model_args.cache_dir)
    logger.info(f"{len(train_images)} images to train on, {len(held_out_images)} held out, {len(names)} classes.")
    model, processor = build_model(model_args, names, train_images.decode(0), new_head=training_args.do_train)

    held_out = ImageTensors(held_out_images, processor) if training_args.do_eval else None
    train = None
    if training_args.do_train:
        train = ImageTensors(train_images, processor)
        side = train[0]["pixel_values"].shape[-1]
        train.padding = side // 8 if data_args.random_crop_padding is None else data_args.random_crop_padding
        train.flip = not data_args.is_digits if data_args.horizontal_flip is None else data_args.horizontal_flip

    trainer_class = LGPTrainer if model_args.trainer == "lgp" else Trainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy(model_args.cache_dir),
        processing_class=processor,
    )

    return run(trainer, checkpoint, "image-classification", f"{len(held_out_images)} images", model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
