"""Conditional WGAN-GP residual networks made of unconditional ones: the same function for every label."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.models.wgan_conditional import conditional_from
from adafm_trainer.models.wgan_config import WganResNetConfig
from adafm_trainer.models.wgan_resnet import ARCHITECTURE
from torch import nn

TINY = WganResNetConfig(size=16, dim=3, z_dim=5)
LABELLED = dataclasses.replace(TINY, classes=4)
JOINED = dataclasses.replace(LABELLED, conditioning="concatenate")


def build(cfg: WganResNetConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A pair whose norms, too, are random."""
    torch.manual_seed(seed)
    networks = ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return networks


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("conditioning", ["batchnorm", "concatenate"])
def test_conditional_networks_start_as_the_unconditional_ones(conditioning: str, statistics: str) -> None:
    plain = dataclasses.replace(TINY, statistics=statistics)
    cfg = dataclasses.replace(plain, classes=4, conditioning=conditioning)
    generator, critic = build(plain)
    with torch.no_grad():
        generator(torch.randn(8, 5))
    after, judging = build(cfg, seed=1)
    after.load_state_dict(conditional_from("generator", generator.state_dict(), cfg))
    z, x = torch.randn(6, 5), torch.randn(2, 3, 16, 16)
    for training in (False, True):
        generator.train(training)
        after.train(training)
        for y in (*(torch.full((6,), c) for c in range(4)), torch.tensor([0, 1, 2, 3, 3, 0])):
            torch.testing.assert_close(after(z, y), generator(z), atol=1e-6, rtol=1e-5)
    torch.manual_seed(0)
    state = conditional_from("discriminator", critic.state_dict(), cfg)
    judging.load_state_dict(state)
    assert torch.equal(judging(x), critic(x))
    assert state["classifier.weight"].std() > 0.05 and not state["classifier.bias"].any()
    state["input.weight"].zero_()
    assert critic.input.weight.any()


def test_labels_count_once_the_tables_differ() -> None:
    z = torch.randn(3, 5)
    for cfg in (LABELLED, JOINED):
        generator = build(cfg)[0]
        assert (generator(z, torch.zeros(3).long()) - generator(z, torch.full((3,), 2))).abs().max() > 0.01
        assert torch.equal(generator(z), generator(z, torch.zeros(3).long()))


def test_what_cannot_be_made_conditional() -> None:
    generator, critic = (network.state_dict() for network in build(TINY))
    with pytest.raises(ValueError, match="classes is 0"):
        conditional_from("generator", generator, TINY)
    with pytest.raises(ValueError, match="network is 'miner'"):
        conditional_from("miner", generator, LABELLED)
    with pytest.raises(SourceError, match="generator: .* in the source; an unconditional wgan-resnet of 32 pixels"):
        conditional_from("generator", generator, dataclasses.replace(LABELLED, size=32))
    with pytest.raises(SourceError, match=r"discriminator: classifier\.\w+ is \[.* in the source.* has nothing"):
        conditional_from("discriminator", build(LABELLED)[1].state_dict(), LABELLED)
    assert not any(name.startswith("classifier") for name in critic)
