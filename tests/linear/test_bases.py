"""Tracked bases."""

import torch

from hf_lgp.linear.bases import initial, moved, sizes, turned


def _start(rank=2):
    return initial(8, 9, rank, torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.float64))


def _formed(gradients):
    return torch.eye(8, dtype=torch.float64).expand(len(gradients), 8, 8), gradients


def _gradients(b=12):
    u, v = torch.randn(8, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    return _formed(u @ torch.randn(b, 2, 2, dtype=torch.float64) @ v.T)


def test_iteration_finds_a_space_of_low_rank():
    basis, gradients = _start(), _gradients()
    for _ in range(30):
        basis = moved(basis, basis.products(gradients))[0]
    lifted = torch.stack([basis.lift(c) for c in basis.project(gradients)])
    torch.testing.assert_close(lifted, gradients[1], rtol=1e-3, atol=1e-3)


def test_stored_coordinates_follow_the_bases():
    basis, gradients = _start(), _gradients()
    stored = basis.project(gradients)
    after, *turns = moved(basis, basis.products(gradients))
    lifted = torch.stack([basis.lift(c) for c in stored])
    torch.testing.assert_close(turned(stored, basis.shape, *turns), after.project(_formed(lifted)))
    torch.testing.assert_close(after.left.T @ after.left, torch.eye(2, dtype=torch.float64))


def test_infinite_gradients_move_nothing():
    basis = _start()
    after, *turns = moved(basis, (torch.full((8, 2), torch.inf), torch.full((9, 2), torch.nan)))
    assert torch.equal(after.left, basis.left) and torch.equal(after.right_moment, basis.right_moment)
    assert torch.equal(turns[0], torch.eye(2, dtype=torch.float64))


def test_sizes():
    assert sizes(100, 80, 16) == (16, 16)
    assert sizes(2, 300, 16) == (2, 128)
    assert sizes(2, 10, 16) == (2, 10)
