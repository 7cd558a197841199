"""The independent Wasserstein critic: about 0 for one distribution, clearly positive for two, repeatable."""

from __future__ import annotations

import pytest
import torch
from adafm_trainer.metrics.iw import _penalty, _rows, independent_wasserstein
from torch import nn


def critic(seed: int = 0, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3, 2, 1), nn.LeakyReLU(0.2)]
        if norm:
            layers.insert(1, nn.BatchNorm2d(16))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))


def images(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(n, 3, 8, 8, generator=generator) + shift).clamp(-1, 1)


def distance(real: torch.Tensor, fake: torch.Tensor, **changes) -> dict:
    values = {"steps": 150, "seed": 1, "batch": 32, **changes}
    return independent_wasserstein(critic(), real, fake, **values)


def test_one_distribution_is_at_about_zero_and_two_are_not() -> None:
    real = images(200, 0)
    same = distance(real, real)["iw_distance"]
    assert same.low < 0 < same.high and abs(same.value) < 0.2
    other = distance(real, images(200, 1))["iw_distance"]
    assert abs(other.value) < 0.3
    near = distance(real, images(200, 1, 0.15))["iw_distance"]
    far = distance(real, images(200, 1, 0.4))["iw_distance"]
    assert near.low > 0 and far.low > near.high, "a larger shift is further away"


def test_values_are_for_images_that_trained_nothing() -> None:
    found = distance(images(21, 0), images(31, 1), steps=3)
    value, signed = found["iw_distance"], found["IW"]
    assert (value.n_fake, value.n_real) == (16, 11) and "3 steps of 10 on 10 real and 15 generated" in value.note
    assert (signed.value, signed.low, signed.high) == (-value.value, -value.high, -value.low)


def test_memory_of_the_training_images_does_not_count() -> None:
    # Of 4 images each in 192 dimensions a linear critic tells those it was trained on apart, but no new ones.
    for seed in range(3):
        linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))
        nn.init.zeros_(linear[1].weight)
        real, fake = images(8, 10 + seed), images(8, 50 + seed)
        value = independent_wasserstein(linear, real, fake, steps=400, seed=0)["iw_distance"].value
        with torch.no_grad():
            whole = float(linear(real).mean() - linear(fake).mean())
        assert whole > 0.5 and abs(value) < 0.25, "half of the whole sets are the training images"


def test_a_seed_repeats_bit_for_bit_and_another_differs() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sets = images(20, 0), images(20, 1, 0.2)
    first, again, other = (distance(*sets, steps=5, seed=s)["iw_distance"].value for s in (1, 1, 2))
    assert first == again != other and torch.equal(torch.get_rng_state(), state)


def test_penalty_of_a_linear_critic_by_hand() -> None:
    weight = torch.tensor([3.0, 4.0])
    real, fake = torch.randn(5, 2, 1, 1), torch.randn(5, 2, 1, 1)
    share = torch.rand(5, 1, 1, 1)
    assert float(_penalty(lambda x: x.flatten(1) @ weight, real, fake, share)) == pytest.approx((5.0 - 1.0) ** 2)
    # f = sum x^2 has gradient 2 u at the mixed point u.
    mixed = share * real + (1 - share) * fake
    expected = ((2 * mixed.flatten(1)).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(_penalty(lambda x: x.square().flatten(1).sum(1), real, fake, share), expected)


def test_an_epoch_uses_every_image_at_most_once() -> None:
    rows = [_rows(10, 3, 0, "x", step).tolist() for step in range(6)]
    assert all(len({i for batch in rows[e : e + 3] for i in batch}) == 9 for e in (0, 3)) and rows[:3] != rows[3:]


def test_bad_input_is_refused() -> None:
    good = images(8, 0)
    with pytest.raises(TypeError, match="uint8"):
        distance(good.to(torch.uint8), good)
    with pytest.raises(ValueError, match="N >= 4, got \\(3, 3, 8, 8\\)"):
        distance(good, good[:3])
    with pytest.raises(ValueError, match="real images are \\(3, 8, 8\\), generated ones \\(3, 4, 4\\)"):
        distance(good, good[:, :, :4, :4])
    with pytest.raises(ValueError, match="steps and batch must be at least 1"):
        distance(good, good, steps=0)


def test_batch_statistics_have_no_place_in_the_critic() -> None:
    network = critic(norm=True)
    found = independent_wasserstein(network, images(40, 0), images(40, 1, 0.4), steps=60, seed=0, batch=20)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) and found["iw_distance"].low > 0
    assert "layer normalisation" in found["iw_distance"].note
    x = images(6, 2)
    torch.testing.assert_close(network(x)[:2], network(x[:2]))
