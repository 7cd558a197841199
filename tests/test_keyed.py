"""Keyed random draws: what they depend on, what they do not, and that they are random at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from adafm_trainer import keyed

DRAWS = [keyed.normal, keyed.uniform]
KNOWN_ORDER = [7, 0, 3, 1, 6, 4, 5, 2]
KNOWN_NORMAL = [0.97175157, -0.16960600, -2.05380154]
KNOWN_UNIFORM = [0.19313240, 0.43390250, 0.64306980]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_do_not_depend_on_the_batch_split(draw) -> None:
    whole = draw(1, "z", 4, range(16), (3, 2))
    parts = [draw(1, "z", 4, rows, (3, 2)) for rows in (range(0, 5), [5], torch.arange(6, 16))]
    assert whole.shape == (16, 3, 2) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), draw(1, "z", 4, range(15, -1, -1), (3, 2)))


@pytest.mark.parametrize("draw", DRAWS)
def test_every_part_of_the_key_counts(draw) -> None:
    keys = itertools.product((0, 1, 2**63), ("z", "flip"), (0, 1, 2**40), (0, 1, 2**33))
    rows = [draw(seed, stream, step, [index], (8,))[0] for seed, stream, step, index in keys]
    assert len({tuple(r.tolist()) for r in rows}) == len(rows) == 54


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_ignore_and_leave_the_global_generators(draw) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = draw(3, "z", 0, range(4), (5,))
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    torch.manual_seed(1)
    assert torch.equal(first, draw(3, "z", 0, range(4), (5,)))


def test_streams_have_the_right_distribution() -> None:
    z = keyed.normal(7, "z", 0, range(2000), (50,)).double()
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 0.02 and abs(float((z[1:] * z[:-1]).mean())) < 0.02
    u = keyed.uniform(7, "u", 0, range(2000), (50,)).double()
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.var()) - 1 / 12) < 0.005
    by_index = keyed.uniform(7, "flip", 0, range(4000))
    assert by_index.shape == (4000,) and 1850 < int((by_index < 0.5).sum()) < 2150


def test_next_step_is_not_the_next_block_of_the_same_stream() -> None:
    # Counters of neighbouring keys are 2**128 apart: long draws never run into the next sample's.
    long = keyed.normal(1, "z", 0, [0], (100_000,))[0]
    other = keyed.normal(1, "z", 0, [1], (1000,))[0]
    assert not torch.isin(other, long).all()


def test_known_draws_stay_what_they_are() -> None:
    # Checkpoints resume on these numbers: a change here breaks every run in progress.
    assert keyed.permutation(0, "data-order", 0, 8).tolist() == KNOWN_ORDER
    torch.testing.assert_close(keyed.normal(0, "z", 0, [0], (3,))[0], torch.tensor(KNOWN_NORMAL), rtol=1e-6, atol=0)
    torch.testing.assert_close(keyed.uniform(0, "z", 5, [2], (3,))[0], torch.tensor(KNOWN_UNIFORM), rtol=1e-6, atol=0)


def test_permutations() -> None:
    orders = [keyed.permutation(2, "order", epoch, 40) for epoch in range(5)]
    assert all(sorted(o) == list(range(40)) for o in orders) and len({tuple(o) for o in orders}) == 5
    assert (keyed.permutation(2, "order", 3, 40) == orders[3]).all()
    assert (keyed.permutation(2, "other", 3, 40) != orders[3]).any()


@pytest.mark.parametrize("draw", DRAWS)
def test_no_samples(draw) -> None:
    assert draw(0, "z", 0, [], (4, 4)).shape == (0, 4, 4)
