"""The predictor's window, queue and state against a list of everything it was shown."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lgp.alignment import MOMENTS, Alignment
from hf_lgp.factors import Factors
from hf_lgp.predictor import GradientPredictor
from hf_lgp.regression import KERNELS, Kernel, KernelRidge
from hf_lgp.subspace import Subspace

SHAPES = [(3, 2), (1, 4), (3, 2)]
FULL = 16  # coordinates of SHAPES without truncation
Examples = tuple[Tensor, Tensor, Tensor]


def predictor(window: int = 5, queue: int = 4, kernel: Kernel = "rbf", rank: int = 4) -> GradientPredictor:
    bases = Subspace(SHAPES, rank, dtype=torch.float64)
    return GradientPredictor(bases, 3, window, queue=queue, kernel=kernel, ridge=0.05, dtype=torch.float64)


def examples(count: int, seed: int, size: int = FULL) -> Examples:
    """Features, pullbacks and coordinates."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, 3), (count, 3), (count, size))
    a, h, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, h, c


def predict(model: GradientPredictor, seed: int = 99) -> Tensor:
    a, h, _ = examples(3, seed)
    return model.predict(model.kernel_rows(a, h))


def reference(seen: Examples, kernel: Kernel = "rbf", seed: int = 99) -> Tensor:
    """Predictions of a regression on exactly these examples."""
    a, h, _ = examples(3, seed)
    ridge = KernelRidge(kernel, 0.05)
    ridge.fit(seen[0], seen[1])
    return ridge.weights(ridge.cross_kernel(a, h)) @ seen[2]


def joined(parts: list[Examples]) -> Examples:
    a, h, c = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return a, h, c


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 6),
    queue=st.integers(1, 9),
    rounds=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    kernel=st.sampled_from(KERNELS),
)
def test_the_window_holds_the_latest_examples_that_were_queued(
    window: int, queue: int, rounds: list[list[int]], kernel: Kernel
) -> None:
    model, seen = predictor(window, queue, kernel), list[Examples]()
    for counts in rounds:
        waiting = 0
        for count in counts:
            batch = examples(count, seed=len(seen))
            model.observe(*batch)
            taken = min(count, queue - waiting)  # what does not fit is dropped
            waiting += taken
            seen.append((batch[0][:taken], batch[1][:taken], batch[2][:taken]))
            assert model.waiting == waiting
        everything = joined(seen)
        assert model.remembered == min(window, len(everything[0]))
        model.refit()
        assert model.waiting == 0 and model.size == model.remembered == min(window, len(everything[0]))
        latest = (everything[0][-window:], everything[1][-window:], everything[2][-window:])
        torch.testing.assert_close(predict(model), reference(latest, kernel), rtol=1e-7, atol=1e-9)


def test_only_a_refit_changes_predictions() -> None:
    model = predictor()
    model.observe(*examples(4, seed=0))
    model.refit()
    before = predict(model)
    model.observe(*examples(3, seed=1))
    assert torch.equal(predict(model), before)
    model.refit()
    assert (predict(model) - before).abs().max() > 1e-3


def test_a_refit_without_examples_does_nothing() -> None:
    model = predictor()
    model.refit()
    assert not model.regression.fitted and model.size == 0


def test_predictions_of_combined_rows() -> None:
    model = predictor()
    model.observe(*examples(4, seed=0))
    model.refit()
    a, h, _ = examples(6, seed=1)
    rows = model.kernel_rows(a, h)
    torch.testing.assert_close(model.predict(rows.sum(0, keepdim=True)), model.predict(rows).sum(0, keepdim=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_non_finite_examples_count_as_zeros(value: float, part: int) -> None:
    model, batch = predictor(window=4), examples(4, seed=0)
    zeroed = tuple(tensor.clone() for tensor in batch)
    for tensor in zeroed:
        tensor[1] = 0.0
    batch[part][1, 2] = value
    model.observe(*batch)
    model.refit()
    assert predict(model).isfinite().all()
    torch.testing.assert_close(predict(model), reference((zeroed[0], zeroed[1], zeroed[2])))


def test_zeroed_examples_carry_no_weight() -> None:
    model, (a, h, c) = predictor(), examples(3, seed=0)
    model.observe(a, torch.full_like(h, torch.nan), c)
    model.refit()
    assert torch.equal(predict(model), torch.zeros(3, FULL).double())


def test_observed_examples_are_copied() -> None:
    model, batch = predictor(), examples(3, seed=0)
    model.observe(*batch)
    expected = reference(batch)
    for tensor in batch:
        tensor.zero_()
    model.refit()
    torch.testing.assert_close(predict(model), expected)


@pytest.mark.parametrize("with_path", [False, True])
def test_measure_compares_centred_coordinates_by_tensor(with_path: bool) -> None:
    model, expected = predictor(), Alignment(3, dtype=torch.float64)
    exact, guess, path = (examples(6, seed=seed)[2] for seed in range(3))
    guess, path = guess + exact, path + 0.5 * exact
    model.measure(exact, path if with_path else None, guess)
    parts = {"g": exact, "p": path if with_path else torch.zeros_like(path), "r": guess}
    sums = torch.zeros(len(MOMENTS), 3, dtype=torch.float64)
    for number, segment in enumerate(model.subspace.segments):
        for column in range(segment.start, segment.start + segment.size):
            centred = {name: values[:, column] - values[:, column].mean() for name, values in parts.items()}
            sums[:, number] += torch.stack([centred[one] @ centred[other] for one, other in MOMENTS])
    expected.update(sums)
    torch.testing.assert_close(model.alignment.moments, expected.moments)
    torch.testing.assert_close(model.alignment.coefficients, expected.coefficients)
    torch.testing.assert_close(model.alignment.beta, expected.beta)


def test_ready_after_a_fit_and_two_measurements() -> None:
    model = predictor()
    *_, c = batch = examples(4, seed=0)
    model.measure(c[:1], c[:1], c[:1])  # one example has no variance
    assert model.alignment.batches == 0
    model.observe(*batch)
    model.refit()
    for expected in (False, False, True):
        assert model.ready is expected
        model.measure(c, None, 2 * c)
    unfitted = predictor()
    for _ in range(3):
        unfitted.measure(c, None, c)
    assert not unfitted.ready


def move_to_random(model: GradientPredictor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, (rows, cols) in enumerate(SHAPES):
        gradients = torch.randn(4, rows, cols, generator=generator, dtype=torch.float64)
        model.subspace.accumulate(number, Factors(None, gradients, rows))
    model.move_bases()


def test_moving_bases_re_expresses_window_queue_and_predictions() -> None:
    model = predictor(rank=1)
    size = model.subspace.size
    assert size < FULL
    model.observe(*examples(4, 0, size))
    model.refit()
    model.observe(*examples(3, 1, size))
    stored = model.state_dict()["coordinates"].clone()
    everything = torch.cat([stored, predict(model)])
    lifted = [model.subspace.lift(row) for row in everything]
    move_to_random(model, seed=2)
    expected = torch.cat(
        [
            model.subspace.project(number, Factors(None, torch.stack([row[number] for row in lifted]), rows))
            for number, (rows, _) in sorted(enumerate(SHAPES), key=lambda item: model.subspace.segments[item[0]].start)
        ],
        dim=1,
    )
    moved = torch.cat([model.state_dict()["coordinates"], predict(model)])
    assert (moved - everything).abs().max() > 1e-3
    torch.testing.assert_close(moved, expected)


def half_way(kernel: Kernel = "rbf") -> GradientPredictor:
    """A predictor whose ring has wrapped around, with a queue and measurements."""
    model = predictor(rank=1, kernel=kernel)
    size = model.subspace.size
    for seed in range(2):
        model.observe(*examples(4, seed, size))
        model.refit()
    move_to_random(model, seed=3)
    model.measure(examples(4, 4, size)[2], examples(4, 9, size)[2], predict(model)[[0, 1, 2, 0]])
    model.observe(*examples(2, 5, size))
    return model


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_restored_predictor_goes_on_bit_for_bit(kernel: Kernel) -> None:
    model, restored = half_way(kernel), predictor(rank=1, kernel=kernel)
    restored.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert (restored.size, restored.waiting, restored.ready) == (model.size, model.waiting, model.ready)
    assert torch.equal(predict(restored), predict(model))
    for one in (model, restored):
        one.observe(*examples(4, 6, one.subspace.size))
        move_to_random(one, seed=7)
        size = one.subspace.size
        one.measure(examples(4, 8, size)[2], examples(4, 10, size)[2], predict(one)[[0, 1, 2, 0]])
        assert one.waiting == 4
        one.refit()
    assert torch.equal(predict(restored), predict(model))
    assert torch.equal(restored.alignment.beta, model.alignment.beta)
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_restored_predictor_is_independent() -> None:
    model, restored = half_way(), predictor(rank=1)
    restored.load_state_dict(model.state_dict())
    before = predict(restored)
    model.observe(*examples(2, 6, model.subspace.size))
    model.refit()
    move_to_random(model, seed=7)
    assert torch.equal(predict(restored), before)


def test_an_unfitted_state_unfits() -> None:
    model, fresh = half_way(), predictor(rank=1)
    fresh.observe(*examples(2, 0, fresh.subspace.size))
    model.load_state_dict(fresh.state_dict())
    assert not model.regression.fitted and model.size == 0 and model.waiting == 2
    model.refit()
    fresh.refit()
    assert torch.equal(predict(model), predict(fresh))


def other_predictor(difference: str) -> GradientPredictor:
    shapes = [(3, 2), (1, 4)] if difference == "model" else SHAPES
    bases = Subspace(shapes, 2 if difference == "rank" else 1, dtype=torch.float64)
    width, window = 4 if difference == "features" else 3, 6 if difference == "window" else 5
    return GradientPredictor(bases, width, window, queue=1 if difference == "queue" else 4, dtype=torch.float64)


@pytest.mark.parametrize("difference", ["window", "queue", "rank", "features", "model"])
def test_a_state_of_another_predictor_is_refused(difference: str) -> None:
    state = half_way().state_dict()
    other_predictor("none").load_state_dict(state)
    with pytest.raises(ValueError, match="another"):
        other_predictor(difference).load_state_dict(state)


@pytest.mark.parametrize(("window", "queue"), [(0, 1), (1, 0)])
def test_window_and_queue_must_hold_something(window: int, queue: int) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        predictor(window, queue)


def test_memory_counts_the_calls_since_an_example_was_observed() -> None:
    model = GradientPredictor(Subspace(SHAPES, 4, dtype=torch.float64), 3, 6, queue=6, memory=2.0, dtype=torch.float64)
    batches = [examples(2, seed=seed) for seed in range(3)]
    for batch in batches:
        model.observe(*batch)
    model.refit()
    reference_fit = KernelRidge("rbf", 0.03)
    ages = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    a, h, c = joined(batches)
    reference_fit.fit(a, h, ages)
    query_a, query_h, _ = examples(3, seed=9)
    expected = reference_fit.weights(reference_fit.cross_kernel(query_a, query_h)) @ c
    torch.testing.assert_close(model.predict(model.kernel_rows(query_a, query_h)), expected, rtol=1e-10, atol=1e-12)
