"""Taking batches apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lgp.batches import batch_size, first_label, part_of


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({"pixel_values": torch.zeros(3, 2), "labels": torch.zeros(3)}, 3),
        ({"scale": torch.tensor(2.0), "name": "a", "x": torch.zeros(4, 1)}, 4),
        ({"x": torch.zeros(0, 2)}, 0),
        ({"scale": torch.tensor(2.0)}, None),
        ({}, None),
        ({"x": torch.zeros(3), "nested": {"y": torch.zeros(3)}}, None),
        ({"x": torch.zeros(3), "several": [torch.zeros(3)]}, None),
        ({"x": torch.zeros(3), "several": (torch.zeros(3),)}, None),
    ],
)
def test_batch_size(inputs: dict[str, Any], size: int | None) -> None:
    assert batch_size(inputs) == size


def test_first_label_follows_the_order_of_the_names() -> None:
    inputs = {"start": torch.tensor([1]), "end": torch.tensor([2]), "text": "no tensor"}
    assert first_label(inputs, ["text", "end", "start"]) is inputs["end"]
    assert first_label(inputs, ["labels", "text"]) is None
    assert first_label(inputs, []) is None


def test_part_of_takes_per_example_tensors_apart() -> None:
    inputs: dict[str, Any] = {
        "x": torch.arange(8).reshape(4, 2),
        "labels": torch.tensor([5, 6, 7, 8]),
        "positions": torch.arange(3),
        "scale": torch.tensor(2.0),
        "flag": True,
    }
    part = part_of(inputs, torch.tensor([3, 1]), 4)
    assert part["x"].tolist() == [[6, 7], [2, 3]]
    assert part["labels"].tolist() == [8, 6]
    assert all(part[name] is inputs[name] for name in ("positions", "scale", "flag"))
    assert inputs["x"].shape == (4, 2) and part.keys() == inputs.keys()


def test_part_of_keeps_and_leaves_out_by_name() -> None:
    inputs = {"x": torch.arange(4), "classes": torch.arange(4), "labels": torch.arange(4)}
    part = part_of(inputs, torch.tensor([2]), 4, keep=["classes"], without=["labels", "absent"])
    assert part.keys() == {"x", "classes"}
    assert part["x"].tolist() == [2]
    assert part["classes"] is inputs["classes"]


def test_parts_cover_the_batch() -> None:
    inputs = {"x": torch.randn(7, 3)}
    order = torch.randperm(7)
    parts = [part_of(inputs, index, 7)["x"] for index in (order[:2], order[2:])]
    assert torch.equal(torch.cat(parts)[order.argsort()], inputs["x"])
