"""One training iteration against the same formulas written out by hand in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from adafm_trainer.methods.average import Average
from adafm_trainer.methods.gan_step import GanStep
from adafm_trainer.methods.losses import gradient_penalty, saturation_penalty
from adafm_trainer.methods.player import Player
from adafm_trainer.methods.step_config import StepConfig
from torch import nn
from torch.nn import functional as F


class TinyGenerator(nn.Module):
    z_dim, noise_shapes = 3, ()

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2 * 16)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def pre_tanh(self, z, y=None, noise=None):
        return self.conv(F.leaky_relu(self.fc(z).view(-1, 2, 4, 4), 0.2))

    def forward(self, z, y=None, noise=None):
        return torch.tanh(self.pre_tanh(z))


class TinyDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(64, 1)

    def forward(self, x, y=None):
        return self.fc(F.softplus(self.conv(x)).flatten(1))[:, 0]


def pair(**config):
    torch.manual_seed(0)
    g, d = TinyGenerator().double(), TinyDiscriminator().double()
    adam = {"lr": 1e-2, "betas": (0.0, 0.99), "fused": True}
    average = Average(g, [n for n, _ in g.named_parameters()], 0.9)
    opt_g, opt_d = torch.optim.Adam(g.parameters(), **adam), torch.optim.Adam(d.parameters(), **adam)
    return g, d, average, GanStep(Player(g, opt_g), Player(d, opt_d), StepConfig(**config))


def penalty_by_hand(d, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return gradient.pow(2).sum((1, 2, 3))


@pytest.mark.parametrize("reg_type", ["real", "fake", "real_fake"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_gradients_and_results_equal_the_formulas(reg_type, interval, micro_batch):
    g, d, _, step = pair(reg_type=reg_type, reg_param=7.0, reg_interval=interval, micro_batch=micro_batch)
    z, x = torch.randn(5, 3).double(), torch.randn(5, 1, 4, 4).double()
    g0, d0 = copy.deepcopy(g), copy.deepcopy(d)

    result = step.generator(z)
    expected = F.softplus(-d0(g0(z))).mean()
    expected.backward()
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.images, g0(z).detach())
    for mine, theirs in zip(g.parameters(), g0.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(p.grad is None and p.requires_grad for p in d.parameters())

    d0.zero_grad()
    images = result.images
    out = step.discriminator(x, images)
    total = F.softplus(-d0(x)).mean() + F.softplus(d0(images)).mean()
    if reg_type in ("real", "real_fake"):
        total = total + 7.0 * interval * penalty_by_hand(d0, x).mean()
    if reg_type in ("fake", "real_fake"):
        total = total + 7.0 * interval * penalty_by_hand(d0, images).mean()
    total.backward()
    for mine, theirs in zip(d.parameters(), d0.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert (out.r1_real is None) == (reg_type == "fake") and (out.r1_fake is None) == (reg_type == "real")


def test_penalty_is_taken_every_interval():
    _, _, _, step = pair(reg_interval=3)
    x = torch.randn(2, 1, 4, 4).double()
    taken = [step.discriminator(x, x).r1_real is not None for _ in range(7)]
    assert taken == [True, False, False, True, False, False, True]


def test_images_are_those_before_the_update():
    g, _, _, step = pair()
    z = torch.randn(4, 3).double()
    before = g(z).detach()
    images = step.generator(z).images
    assert torch.equal(images, before) and not torch.equal(g(z), before)


def test_non_finite_step_is_not_taken():
    g, d, _, step = pair()
    with torch.no_grad():
        d.fc.weight[0, 0] = float("nan")
    before = copy.deepcopy(g.state_dict())
    assert not step.generator(torch.randn(2, 3).double()).finite
    assert all(torch.equal(before[k], v) for k, v in g.state_dict().items())


def test_average_follows_trained_tensors_only_and_ramps():
    g = TinyGenerator()
    start = copy.deepcopy(g.state_dict())
    average = Average(g, ["conv.weight"], 0.9, ramp=True)
    with torch.no_grad():
        for p in g.parameters():
            p.add_(1.0)
    average.update()
    state = average.module.state_dict()
    torch.testing.assert_close(state["conv.weight"], start["conv.weight"] + 0.9)  # decay (1 + 0) / (10 + 0)
    assert average.current_decay() == pytest.approx(2 / 11)
    average.updates = 10**6
    assert average.current_decay() == 0.9


def test_average_holds_the_statistics_that_belong_to_its_weights():
    g = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with torch.no_grad():
        g[1].running_var.uniform_()
    kept = g[1].running_var.clone()
    average = Average(g, [n for n, _ in g.named_parameters()], 0.75)
    with torch.no_grad():
        g[0].running_mean.fill_(4.0)
        g[0].num_batches_tracked.fill_(5)
    average.update()
    assert torch.equal(average.module[0].running_mean, torch.full((3,), 1.0))
    average.update()
    assert torch.equal(average.module[0].running_mean, torch.full((3,), 1.75))
    assert average.module[0].num_batches_tracked.item() == 5
    assert torch.equal(average.module[1].running_var, kept)


def test_average_holds_what_is_frozen_only_once():
    g = TinyGenerator()
    average = Average(g, ["conv.weight"], 0.9)
    mean = dict(average.module.named_parameters())
    shared = {name for name, p in g.named_parameters() if mean[name] is p}
    assert shared == set(mean) - {"conv.weight"}
    assert not mean["conv.weight"].requires_grad and all(p.requires_grad for p in g.parameters())


def test_average_rejects_unknown_names_and_decays():
    with pytest.raises(ValueError, match=r"not in the network: conv\.weigth"):
        Average(TinyGenerator(), ["conv.weigth"], 0.9)
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        Average(TinyGenerator(), [], 1.0)


def test_penalties_are_wide_and_correct():
    x = torch.randn(3, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert gradient_penalty((x * x).flatten(1).sum(1), x).dtype == torch.float32
    assert saturation_penalty(torch.tensor([1.0, -2.5, 4.5]), 2.5).item() == pytest.approx(4.0 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "lsgan"}, "'lsgan'"),
        ({"reg_type": "both"}, "'both'"),
        ({"reg_interval": 0}, "reg_interval is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_bad_settings_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**change)
