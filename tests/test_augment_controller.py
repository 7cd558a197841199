"""The controller of the adaptive augmentation: when p rises and falls, and how it goes on after a restart."""

from __future__ import annotations

import math

import pytest
import torch
from augmenting import ada

BLIT = ("flip", "turn", "move")
WARP = ("scale", "rotate_before", "stretch", "rotate_after", "shift")


def test_p_rises_while_d_is_sure_of_the_reals_and_falls_when_it_is_not():
    augment = ada(0.0, interval=4, images=1000)
    sure, unsure = (
        torch.tensor([3.0, 2.0, 0.1, 1.0, 5.0, 2.0, 1.0, -1.0, 9.0, 4.0]),
        torch.tensor([1.0, 1.0, 1.0, -1.0]),
    )
    seen, history = 0, []
    for logits in [sure] * 12 + [unsure] * 8:
        seen += 10
        augment.update(logits, seen)
        history.append(round(float(augment.p), 6))
    assert history == [0] * 3 + [0.04] * 4 + [0.08] * 4 + [0.12] * 4 + [0.08] * 4 + [0.04]
    assert float(augment.r) == 0.5
    for _ in range(12):
        seen += 10
        augment.update(unsure, seen)
    assert float(augment.p) == 0


def test_p_goes_from_zero_to_one_over_the_given_images():
    augment = ada(0.0, interval=4, images=500)
    steps = 0
    while float(augment.p) < 1:
        steps += 1
        augment.update(torch.ones(5), 5 * steps)
    assert 5 * steps == 500
    augment.update(torch.ones(5), 5 * steps + 5)
    assert float(augment.p) == 1


def test_p_without_numbers_from_d():
    augment = ada(0.5, interval=1, images=100)
    augment.update(torch.tensor([math.nan, math.inf]), 10)
    assert float(augment.p) == pytest.approx(0.4) and float(augment.r) == 0.5


def test_the_controller_goes_on_where_its_state_was_saved(tmp_path):
    def run(augment, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            augment.update(torch.randn(6, generator=generator) + 1.2, 6 * (step + 1))

    whole = ada(0.0, images=300)
    run(whole, range(22))
    first = ada(0.0, images=300)
    run(first, range(9))
    state = first.state_dict()
    run(first, range(9, 16))
    torch.save(state, tmp_path / "state.pt")
    again = ada(0.0, images=300)
    held = again.p
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(again, range(9, 22))
    assert again.p is held and float(whole.p) > 0
    assert {k: float(v) for k, v in again.state_dict().items()} == {k: float(v) for k, v in whole.state_dict().items()}


def test_processes_hold_one_state():
    given = []

    def exchange(tensors):
        given.append(tensors[0].item())
        tensors[0].fill_(0.7)

    augments = [ada(0.0, exchange=exchange, images=100) for _ in range(2)]
    for step in range(6):
        for augment, logits in zip(augments, ([1.0, 1.0], [1.0, -1.0]), strict=True):
            augment.update(torch.tensor(logits), 4 * (step + 1))
    assert given == [1.0, 0.0] * 6
    first, second = (augment.state_dict() for augment in augments)
    assert first == second and float(first["p"]) == pytest.approx(0.16) and float(first["r"]) == pytest.approx(0.7)
