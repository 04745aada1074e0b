"""How batches of any kind are taken apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from hf_lgp.batches import entries_of, examples_of, few_of, versions_of


@pytest.mark.parametrize(
    "batch",
    [
        {"a": torch.zeros(5, 2), "b": [torch.zeros(5), "text"], "c": torch.zeros(3)},
        (torch.zeros(5, 2), {"y": torch.zeros(5)}),
        torch.zeros(5, 2),
    ],
)
def test_few_examples_are_taken_of_any_kind_of_batch(batch: Any) -> None:
    assert examples_of(batch) == 5 and examples_of(few_of(batch, 2)) == 2
    assert entries_of(batch) == 10 and examples_of("text") == 0
    if isinstance(batch, dict):
        few = few_of(batch, 2)
        assert len(few["b"][0]) == 2 and few["b"][1] == "text" and len(few["c"]) == 3 and len(batch["a"]) == 5


def test_copies_have_the_type_and_memory_of_their_own() -> None:
    batch = BatchEncoding({"input_ids": torch.ones(3, 2)})
    few = few_of(batch, 3)
    few.input_ids.zero_()
    assert type(few) is BatchEncoding and batch.input_ids.all()


def test_what_is_changed_in_place_is_noticed() -> None:
    with torch.inference_mode():
        untold = torch.ones(2)
    batch = {"a": torch.ones(2), "b": untold}
    before = versions_of(batch)
    assert versions_of(batch) == before and before[1] is None
    batch["a"].mul_(2)
    assert versions_of(batch) != before
