"""How batches of any kind are taken apart."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from hf_lgp.batches import changed, entries_of, examples_of, few_of, versions_of


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
    assert not changed(before, batch) and before[1] == (untold, None)
    batch["a"].mul_(2)
    assert changed(before, batch)


@pytest.mark.parametrize("change", [lambda b: b.update(a=torch.ones(2)), lambda b: b.pop("a")])
def test_what_stands_in_another_s_place_is_noticed(change: Any) -> None:
    batch = {"a": torch.ones(2), "b": torch.ones(2)}
    before = versions_of(batch)
    change(batch)
    assert changed(before, batch)


def test_copies_hold_whatever_else_a_batch_holds() -> None:
    class Named(dict):  # type: ignore[type-arg]
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    batch = Named("first")
    batch["a"] = torch.ones(3)
    few = few_of(batch, 2)
    assert type(few) is Named and few.name == "first" and len(few["a"]) == 2 and len(batch["a"]) == 3
    encoded = few_of(BatchEncoding({"input_ids": torch.ones(3, 2)}, encoding=[]), 2)
    assert encoded.encodings == [] and len(encoded.input_ids) == 2


class Held(MutableMapping):  # type: ignore[type-arg]
    """A mapping that knows how to copy itself by its constructor only."""

    def __init__(self, items: Any) -> None:
        self.items_ = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self.items_[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.items_[name] = value

    def __delitem__(self, name: str) -> None:
        del self.items_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def test_a_copy_of_a_mapping_leaves_it_alone() -> None:
    batch = Held({"a": torch.ones(3)})
    few = few_of(batch, 2)
    assert type(few) is Held and len(few["a"]) == 2 and len(batch["a"]) == 3


def test_nested_tensors_are_copied_whole() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    assert few_of({"rows": nested}, 2)["rows"].is_nested
