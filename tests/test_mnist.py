"""The MNIST networks: sides, padding, published names and sizes."""

from __future__ import annotations

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.methods.losses import gradient_norm_penalty, interpolate
from adafm_trainer.models.mnist import ARCHITECTURE, MnistConfig, infer, same_padding
from torch import nn

from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d

TINY = MnistConfig(dim=2, z_dim=3)


def build(cfg: MnistConfig = TINY) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "expected"),
    [
        (28, 5, 2, (1, 2)),
        (14, 5, 2, (1, 2)),
        (7, 5, 2, (2, 2)),
        (7, 3, 1, (1, 1)),
        (8, 1, 2, (0, 0)),
        (8, 4, 2, (1, 1)),
    ],
)
def test_same_padding(side: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_padding(side, kernel, stride) == expected


def test_shapes_and_range() -> None:
    generator, critic = build()
    z = torch.randn(4, 3)
    images = generator(z)
    assert images.shape == (4, 1, 28, 28)
    torch.testing.assert_close(images, 2 * torch.sigmoid(2 * generator.pre_tanh(z)) - 1)
    assert [tuple(h.shape[1:]) for h in critic.features(images)] == [(2, 14, 14), (4, 7, 7), (8, 4, 4)]
    assert critic(images).shape == (4,)


def test_every_position_of_the_image_is_within_reach() -> None:
    # Enough channels that no position has all of its inputs cut off by a ReLU.
    generator = build(MnistConfig(dim=16, z_dim=3))[0]
    images = generator(torch.randn(64, 3))
    assert (images.std(0) > 0).all()


def test_the_penalty_by_published_pixels_is_that_of_a_scale_of_two() -> None:
    critic = build()[1].double()
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64) * 2 - 1
    between = interpolate(images, images.flip(0), torch.tensor([0.1, 0.7]))
    found = gradient_norm_penalty(critic(between), between, scale=critic.gradient_scale)
    pixels = ((between.detach() + 1) / 2).requires_grad_()
    torch.testing.assert_close(found, gradient_norm_penalty(critic(2 * pixels - 1), pixels))


def test_checkpointing_changes_nothing() -> None:
    outcomes = []
    for kept in (False, True):
        generator, critic = build()
        generator.checkpoint_activations = critic.checkpoint_activations = kept
        images = generator(torch.ones(2, 3))
        between = interpolate(images, images.flip(0), torch.tensor([0.1, 0.7]))
        (critic(images).mean() + gradient_norm_penalty(critic(between), between).mean()).backward()
        outcomes.append([p.grad for network in (generator, critic) for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_groups_and_modulated_convolutions() -> None:
    generator, critic = build()
    for network, order in (
        (generator, ["deconv3", "deconv2", "deconv1", "input"]),
        (critic, ["conv1", "conv2", "conv3", "output"]),
    ):
        assert [name for name, _ in ARCHITECTURE.groups(network, TINY)] == order
        argument = torch.randn(2, 3) if network is generator else torch.randn(2, 1, 28, 28)
        before = network(argument)
        for name in (found := ARCHITECTURE.modulated(network, order)):
            layer = network.get_submodule(name)
            kind = AdaFMConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else AdaFMConv2d
            network.set_submodule(name, kind.from_module(layer))
        torch.testing.assert_close(network(argument), before)
        assert found == (["deconv2", "deconv1"] if network is generator else ["conv1", "conv2", "conv3"])


def test_sizes_are_told_from_the_tensors() -> None:
    cfg = MnistConfig(channels=2, dim=3, z_dim=7)
    state = build(cfg)[0].state_dict()
    assert infer("mnist", {"generator": state}) == cfg
    with pytest.raises(SourceError, match="no generator among nothing"):
        infer("mnist", {})
    with pytest.raises(SourceError, match="no deconv3.weight; is it really of --arch mnist"):
        infer("mnist", {"generator": {"input.weight": torch.zeros(16, 2)}})
    with pytest.raises(SourceError, match="first layer makes 16 values; --arch mnist of base width 3 has 192"):
        infer("mnist", {"average": state | {"input.weight": torch.zeros(16, 2)}})
    with pytest.raises(SourceError, match="do not fit --arch mnist"):
        infer("mnist", {"generator": state | {"input.weight": torch.zeros(16)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 32}, "size is 32; arch mnist has 28"), ({"classes": 10}, "classes is 10"), ({"dim": 0}, "dim is 0")],
)
def test_bad_descriptions(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARCHITECTURE.describe(TINY.to_json() | changes)


def test_bad_inputs() -> None:
    generator, critic = build()
    with pytest.raises(ValueError, match=r"z has shape \(2, 4\); expected \[B, 3\]"):
        generator(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected \[B, 1, 28, 28\]"):
        critic(torch.zeros(2, 3, 28, 28))
