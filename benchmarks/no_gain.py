"""Tasks on which prediction cannot pay: how much longer does ``LGPTrainer`` take than plain ``Trainer``, and does it learn as well?

``random-labels``: CIFAR-10 images whose labels are drawn at random, so that nothing is to be learned but the images one by
one. They are not augmented, and accuracy is that on the training images: on any others it is chance. ``tiny``: scikit-learn's digits and a ViT
of two blocks of width 32, whose steps are so short that every overhead shows. Runs, options and result files are those of
``time_to_accuracy.py``; the figures to read are ``total_seconds`` and ``final_accuracy``. Runs of some seconds are best compared
with ``--turns 0.1``: a machine's speed changes more from one run to the next than what is to be measured.
"""

from __future__ import annotations

import argparse
import sys

import torch
from accuracy_tasks import Task, cifar, resized
from common import VITS, build_vit
from time_to_accuracy import argument_parser, main_of, parsed


def random_labels(options: argparse.Namespace) -> Task:
    """CIFAR-10 with labels that mean nothing."""
    images, _ = cifar(options, "train")
    images = images[: options.images or len(images)].clone()
    train = images, torch.randint(0, 10, (len(images),), generator=torch.Generator().manual_seed(0))
    return Task(
        train, train, lambda seed: build_vit(options.vit, seed=seed, attn_implementation=options.attention), False
    )


def tiny(options: argparse.Namespace) -> Task:
    """Handwritten digits; every fifth is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images, labels = resized(images, VITS[options.vit]["image_size"]), torch.from_numpy(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    count = options.images or len(labels)
    return Task(
        (images[~held_out][:count], labels[~held_out][:count]),
        (images[held_out], labels[held_out]),
        lambda seed: build_vit(options.vit, seed=seed, attn_implementation=options.attention),
        augment=False,  # a mirrored digit is none
    )


TASKS = {"random-labels": random_labels, "tiny": tiny}
DEFAULTS = {"random-labels": dict(images=10_000, epochs=6), "tiny": dict(vit="digits-tiny", batch=32, epochs=30)}


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0], list(TASKS))
    task = parser.parse_known_args(sys.argv[1:])[0].task
    parser.set_defaults(seeds=[0, 1, 2], **DEFAULTS[task])
    main_of(parsed(parser, "no_gain"), TASKS)


if __name__ == "__main__":
    main()
