"""The WGAN-GP residual networks: sizes, normalisation, groups, published names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.methods.losses import gradient_norm_penalty, interpolate
from adafm_trainer.models.wgan_config import WganResNetConfig
from adafm_trainer.models.wgan_names import infer, rename
from adafm_trainer.models.wgan_resnet import ARCHITECTURE
from torch import Tensor, nn

from adafm_kernels.nn import AdaFMConv2d

TINY = WganResNetConfig(size=16, dim=3, z_dim=5)
LABELLED = dataclasses.replace(TINY, classes=4)
JOINED = dataclasses.replace(LABELLED, conditioning="concatenate")
RUNNING = dataclasses.replace(TINY, statistics="running")


def build(cfg: WganResNetConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    networks = ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return networks


def published(network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters as the TensorFlow code stores them."""
    root = "Generator" if hasattr(network, "z_dim") else "Discriminator"
    special = {"output_norm": "OutputN", "classifier": "ACGANOutput", "bn1": "BN1", "bn2": "BN2"}
    state = {}
    for name, layer in network.named_modules():
        if not (own := dict(layer.named_parameters(recurse=False))):
            continue
        path = ".".join([root, *(special.get(part, part.capitalize()) for part in name.split("."))])
        if isinstance(layer, nn.Conv2d):
            weight, bias, value = "Filters", "Biases", own["weight"].permute(2, 3, 1, 0)
        elif isinstance(layer, nn.Linear):
            weight, bias, value = "W", "b", own["weight"].t()
        else:
            weight, bias, value = "scale", "offset", own["weight"]
        state[f"{path}.{weight}"] = value.detach()
        if own.get("bias") is not None:
            state[f"{path}.{bias}"] = own["bias"].detach()
    return state


@pytest.mark.parametrize(("classes", "expected"), [(0, (8_540_483, 7_491_841)), (10, (8_584_259, 7_573_771))])
def test_published_sizes(classes: int, expected: tuple[int, int]) -> None:
    cfg = WganResNetConfig(classes=classes)
    with torch.device("meta"):
        networks = ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == expected
    assert cfg.widths == (512, 512, 256, 128, 64)


@pytest.mark.parametrize(("size", "channels", "classes"), [(16, 1, 0), (32, 3, 3), (64, 2, 0)])
def test_shapes(size: int, channels: int, classes: int) -> None:
    cfg = WganResNetConfig(size=size, channels=channels, dim=2, z_dim=4, classes=classes)
    generator, critic = build(cfg)
    y = torch.arange(3) % classes if classes else None
    images = generator(torch.randn(3, 4), y)
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert critic(images, y).shape == (3,)
    assert hasattr(critic, "judge") == bool(classes)
    if classes:
        scores, logits = critic.judge(images)
        assert logits.shape == (3, classes) and torch.equal(scores, critic(images))


def test_an_image_depends_on_its_batch_as_published() -> None:
    generator, z = build(TINY)[0].eval(), torch.randn(4, 5)
    alone = torch.cat([generator(z[i : i + 1]) for i in range(4)])
    assert (alone - generator(z)).abs().max() > 0.01


def test_running_statistics_make_images_independent() -> None:
    generator, z = build(RUNNING)[0], torch.randn(4, 5)
    before = generator.output_norm.running_mean.clone()
    trained = generator(z)
    assert not torch.equal(generator.output_norm.running_mean, before)
    generator.eval()
    kept = generator.output_norm.running_mean.clone()
    together = generator(z)
    torch.testing.assert_close(torch.cat([generator(z[i : i + 1]) for i in range(4)]), together)
    assert torch.equal(generator.output_norm.running_mean, kept)
    assert (trained - together).abs().max() > 0.01
    # After many batches the averages are those of the batch, and so is the image.
    generator.train()
    with torch.no_grad():
        for _ in range(200):
            generator(z)
    generator.eval()
    unbiased = generator.output_norm.running_var
    assert (unbiased - 1).abs().max() > 0.01
    torch.testing.assert_close(generator(z), trained, atol=0.1, rtol=0)


@pytest.mark.parametrize("cfg", [RUNNING, LABELLED], ids=["running", "labelled"])
def test_checkpointing_changes_nothing(cfg: WganResNetConfig) -> None:
    z, y = torch.randn(4, 5), torch.tensor([0, 3, 1, 1])
    outcomes = []
    for kept in (False, True):
        generator, critic = build(cfg)
        generator.checkpoint_activations = critic.checkpoint_activations = kept
        images = generator(z, y)
        between = interpolate(torch.zeros_like(images), images, torch.full((4,), 0.5))
        total = critic(images).mean() + gradient_norm_penalty(critic(between), between).mean()
        total.backward()
        gradients = [p.grad for network in (generator, critic) for p in network.parameters() if p.grad is not None]
        outcomes.append([images, *gradients, *generator.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_the_critic_normalises_each_image_by_itself() -> None:
    critic, x = build(TINY)[1], torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(torch.cat([critic(x[i : i + 1]) for i in range(3)]), critic(x))
    layer, h = critic.res1.bn1, torch.randn(2, 3, 8, 8)
    n = (h - h.mean((1, 2, 3), keepdim=True)) / (h.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(h), n * layer.weight[:, None, None] + layer.bias[:, None, None])


def test_the_penalty_can_be_differentiated() -> None:
    cfg = WganResNetConfig(size=16, channels=1, dim=1, z_dim=2)
    critic = build(cfg, seed=2)[1].double()
    real, fake, e = (*torch.randn(2, 2, 1, 16, 16, dtype=torch.float64).unbind(), torch.tensor([0.3, 0.8]))
    names, parameters = zip(*critic.named_parameters(), strict=True)

    def penalty(*values: Tensor) -> Tensor:
        between = interpolate(real, fake, e)
        scores = torch.func.functional_call(critic, dict(zip(names, values, strict=True)), between)
        return gradient_norm_penalty(scores, between).mean()

    assert torch.autograd.gradcheck(penalty, tuple(p.detach().requires_grad_() for p in parameters), fast_mode=True)


def test_the_generator_can_be_differentiated_twice() -> None:
    generator = build(dataclasses.replace(LABELLED, channels=1, dim=1, z_dim=2), seed=1)[0].double()
    z, y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3])
    assert torch.autograd.gradgradcheck(lambda z: generator(z, y), (z,), fast_mode=True)


def test_initial_weights_have_the_published_deviation() -> None:
    torch.manual_seed(0)
    cfg = WganResNetConfig(size=16, dim=32, z_dim=64, classes=3)
    generator, critic = ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)
    for layer, variance in (
        (generator.input, 2 / (64 + 2048)),
        (generator.res1.conv1, 4 / ((128 + 64) * 9)),
        (generator.res1.conv2, 4 / ((64 + 64) * 9)),
        (generator.res1.shortcut, 2 / (128 + 64)),
        (critic.res2.conv1, 4 / ((64 + 64) * 9)),
        (critic.res2.shortcut, 2 / (64 + 128)),
        (critic.input, 2 / ((3 + 32) * 9)),
        (generator.output, 4 / ((3 + 32) * 9)),
        (critic.classifier, 2 / (2048 + 3)),
    ):
        deviation = variance**0.5
        assert abs(layer.weight.std().item() / deviation - 1) < 0.06
        assert layer.weight.abs().max() <= deviation * 3**0.5 * (1 + 1e-6)
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("cfg", [TINY, LABELLED, WganResNetConfig(size=64, dim=1)], ids=["tiny", "labelled", "64"])
def test_groups_hold_every_parameter_once_from_the_image_side(cfg: WganResNetConfig) -> None:
    generator, critic = build(cfg)
    for network, first, last in ((generator, "output", "input"), (critic, "input", "output")):
        groups = ARCHITECTURE.groups(network, cfg)
        assert groups[0][0] == first and groups[-1][0] == last and len(groups) == cfg.blocks + 2
        held = [
            f"{m}.{leaf}" for _, ms in groups for m in ms for leaf, _ in network.get_submodule(m).named_parameters()
        ]
        assert sorted(held) == sorted(name for name, _ in network.named_parameters())
    assert ARCHITECTURE.groups(generator, cfg)[1][0] == f"res{cfg.blocks}"


def test_modulated_convolutions_start_as_they_were() -> None:
    for network, argument in zip(build(TINY), (torch.randn(2, 5), torch.randn(2, 3, 16, 16)), strict=True):
        before = network(argument)
        names = [name for _, modules in ARCHITECTURE.groups(network, TINY) for name in modules]
        found = ARCHITECTURE.modulated(network, names)
        assert len(found) == 2 * TINY.blocks
        for name in found:
            network.set_submodule(name, AdaFMConv2d.from_module(network.get_submodule(name)))
        assert torch.equal(network(argument), before)


@pytest.mark.parametrize(
    "cfg",
    [TINY, LABELLED, JOINED, WganResNetConfig(size=128, channels=1, dim=1, z_dim=3, classes=2)],
    ids=["plain", "labelled", "joined", "128"],
)
def test_published_weights_are_told_and_read(cfg: WganResNetConfig) -> None:
    generator, critic = build(cfg)
    variables = published(generator) | published(critic)
    variables["Generator.Res1.BN1.moving_mean"] = torch.zeros(7)
    assert infer("wgan-resnet", {"generator": variables, "discriminator": variables}) == cfg
    for name, network in (("generator", generator), ("average", generator), ("discriminator", critic)):
        renamed = rename(name, variables)
        assert renamed.keys() == network.state_dict().keys()
        assert all(torch.equal(renamed[key], value) for key, value in network.state_dict().items())
    ours = {"generator": generator.state_dict(), "discriminator": critic.state_dict()}
    assert infer("wgan-resnet", ours) == cfg


def test_what_is_not_understood_is_kept_for_the_report() -> None:
    kept = {
        "beta1_power": torch.ones(()),
        "Generator.Input.W/Adam": torch.ones(2),
        "Generator.Input.gain": torch.ones(1),
    }
    assert rename("generator", kept) == kept
    with pytest.raises(ValueError, match="network is 'critic'; expected one of generator, average, discriminator"):
        rename("critic", kept)


def test_sizes_that_cannot_be_told() -> None:
    generator, critic = (network.state_dict() for network in build(LABELLED))
    with pytest.raises(SourceError, match="no generator among discriminator"):
        infer("wgan-resnet", {"discriminator": critic})
    with pytest.raises(SourceError, match=r"no output.weight; is it really of --arch wgan-resnet"):
        infer("wgan-resnet", {"generator": {k: v for k, v in generator.items() if k != "output.weight"}})
    with pytest.raises(SourceError, match="tables for 4 classes, the critic's classifier 2"):
        infer(
            "wgan-resnet", {"generator": generator, "discriminator": critic | {"classifier.weight": torch.zeros(2, 9)}}
        )
    with pytest.raises(SourceError, match="first layer of 32 values"):
        infer("wgan-resnet", {"generator": generator | {"input.weight": torch.zeros(32, 5)}})
    with pytest.raises(SourceError, match=r"blocks \[1, 2, 4\]"):
        infer("wgan-resnet", {"generator": generator | {"res4.conv1.weight": torch.zeros(1)}})
    with pytest.raises(SourceError, match="size is 8"):
        infer("wgan-resnet", {"generator": {k: v for k, v in generator.items() if not k.startswith("res2")}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 48}, "size is 48; arch wgan-resnet makes powers of two from 16"),
        ({"size": 8}, "size is 8; it must be an integer of at least 16"),
        ({"dim": 0}, "dim is 0"),
        ({"z_dim": 1.5}, "z_dim is 1.5"),
        ({"classes": -1}, "classes is -1"),
        ({"conditioning": "film"}, "conditioning is 'film'; expected one of batchnorm, concatenate"),
        ({"statistics": "eval"}, "statistics is 'eval'; expected one of batch, running"),
        ({"arch": "resnet"}, "arch is 'resnet'; expected wgan-resnet"),
        ({"nf": 3}, "unknown field nf"),
    ],
)
def test_bad_descriptions(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARCHITECTURE.describe(TINY.to_json() | changes)


def test_descriptions_survive_json() -> None:
    assert ARCHITECTURE.describe(JOINED.to_json()) == JOINED


def test_bad_inputs() -> None:
    generator, critic = build(TINY)
    with pytest.raises(ValueError, match=r"z has shape \(2, 4\); expected \[B, 5\]"):
        generator(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="noise has shapes"):
        generator(torch.zeros(2, 5), noise=[torch.zeros(2, 1, 4, 4)])
    with pytest.raises(ValueError, match=r"expected \[B, 3, 16, 16\]"):
        critic(torch.zeros(2, 3, 32, 32))
