"""DCGAN pairs: the usual layout, batch statistics, second derivatives, groups, modulation and outside files."""

from __future__ import annotations

import copy

import pytest
import torch
from adafm_trainer.data.packaged import GENERATORS, packaged_file
from adafm_trainer.errors import SourceError, UsageError
from adafm_trainer.models.checkpoints import load_matching
from adafm_trainer.models.dcgan import ARCHITECTURE, DCGANConfig, infer, rename
from torch import nn

from adafm_kernels.nn import AdaFMConvTranspose2d

TINY = DCGANConfig(size=16, z_dim=7, ngf=6, ndf=5)


def pair(cfg: DCGANConfig = TINY, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURE.generator(cfg), ARCHITECTURE.discriminator(cfg)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def usual_generator(z: int, ngf: int, channels: int) -> nn.Sequential:
    """The 64 px generator of Radford et al., written out."""
    layers, fin = [], z
    for k, fout in enumerate((8 * ngf, 4 * ngf, 2 * ngf, ngf)):
        layers += [nn.ConvTranspose2d(fin, fout, 4, 2 if k else 1, 1 if k else 0, bias=False), nn.BatchNorm2d(fout)]
        layers, fin = [*layers, nn.ReLU()], fout
    return nn.Sequential(*layers, nn.ConvTranspose2d(ngf, channels, 4, 2, 1, bias=False), nn.Tanh())


def usual_discriminator(ndf: int, channels: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for k in (1, 2, 4):
        layers += [nn.Conv2d(k * ndf, 2 * k * ndf, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * k * ndf), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 0, bias=False))


@pytest.mark.parametrize("training", [True, False])
def test_networks_are_the_usual_ones(training: bool) -> None:
    cfg = DCGANConfig(ngf=3, ndf=4, z_dim=9)
    generator, discriminator = pair(cfg)
    written = usual_generator(9, 3, 3), usual_discriminator(4, 3)
    for network, plain in zip((generator, discriminator), written, strict=True):
        state = {name.removeprefix("main."): value for name, value in network.state_dict().items()}
        plain.load_state_dict(copy.deepcopy(state))
        network.train(training), plain.train(training)
    z, x = normal(4, 9), normal(4, 3, 64, 64, seed=1)
    torch.testing.assert_close(generator(z), written[0](z[:, :, None, None]))
    torch.testing.assert_close(generator.pre_tanh(z), written[0][:-1](z[:, :, None, None]))
    torch.testing.assert_close(discriminator(x), written[1](x).view(4))
    assert generator(z).shape == (4, 3, 64, 64) and discriminator(x).shape == (4,)


def test_sizes_of_the_published_pair() -> None:
    generator, discriminator = (ARCHITECTURE.generator(DCGANConfig()), ARCHITECTURE.discriminator(DCGANConfig()))
    assert sum(p.numel() for p in generator.parameters()) == 3_576_704
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_568
    assert generator.state_dict()["main.12.weight"].shape == (64, 3, 4, 4)
    assert discriminator.state_dict()["main.11.weight"].shape == (1, 512, 4, 4)
    weights = [p for p in generator.parameters() if p.dim() == 4]
    assert all(float(w.detach().std()) == pytest.approx(0.02, rel=0.05) for w in weights)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_other_sides(size: int) -> None:
    generator, discriminator = pair(DCGANConfig(size=size, ngf=2, ndf=2, channels=1))
    image = generator(normal(2, 100))
    assert image.shape == (2, 1, size, size) and discriminator(image).shape == (2,)


def test_evaluation_uses_the_running_statistics() -> None:
    generator, _ = pair()
    before = copy.deepcopy(generator.main[1].running_mean)
    z = normal(8, 7)
    whole = generator(z)
    assert not torch.equal(generator.main[1].running_mean, before) and int(generator.main[1].num_batches_tracked) == 1
    assert not torch.allclose(generator(z[:4]), whole[:4], atol=1e-3), "in training an image depends on its batch"
    generator.eval()
    held = copy.deepcopy(generator.state_dict())
    torch.testing.assert_close(generator(z)[:3], generator(z[:3]))
    assert all(torch.equal(value, held[name]) for name, value in generator.state_dict().items())


def gradients(network: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a loss with a gradient penalty, and the buffers after it."""
    inputs = inputs.clone().requires_grad_()
    out = network(inputs)
    (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    found = torch.autograd.grad(out.square().mean() + slope.square().sum(), list(network.parameters()))
    return [*found, *network.buffers()]


@pytest.mark.parametrize("which", [0, 1])
def test_checkpointing_changes_no_bit_of_gradients_and_statistics(which: int) -> None:
    inputs = normal(4, 7) if which == 0 else normal(4, 3, 16, 16)
    plain, checkpointed = pair()[which], pair()[which]
    checkpointed.checkpoint_activations = True
    for found, expected in zip(gradients(checkpointed, inputs), gradients(plain, inputs), strict=True):
        assert torch.equal(found, expected)


def test_the_penalty_is_differentiated_rightly() -> None:
    discriminator = pair()[1].double()
    x = normal(3, 3, 16, 16).double().requires_grad_()
    weight = discriminator.main[2].weight

    def penalty(w: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(discriminator, {"main.2.weight": w}, (x,))
        return torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum()

    (gradient,) = torch.autograd.grad(penalty(weight), weight)
    direction = normal(*weight.shape, seed=3).double()
    step = 1e-6
    numeric = (penalty(weight + step * direction) - penalty(weight - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(numeric.item(), rel=1e-5)


def test_half_precision_keeps_the_normalisation_wide() -> None:
    generator, discriminator = pair()
    z = normal(8, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = generator.pre_tanh(z)
        logits = discriminator(x := normal(8, 3, 16, 16).requires_grad_())
        (slope,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert narrow.dtype == torch.bfloat16 and generator.main[1].running_mean.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in discriminator.parameters())
    wide = pair()[0].pre_tanh(z).detach()
    assert float((narrow.detach().float() - wide).abs().max()) < 0.05 * float(wide.abs().max())


def test_groups_hold_every_parameter_once_image_side_first() -> None:
    for network in pair():
        groups = ARCHITECTURE.groups(network, TINY)
        assert [name for name, _ in groups] == ["conv_img", "side8", "side4"]
        listed = [
            f"{m}.{p}" for _, names in groups for m in names for p, _ in network.get_submodule(m).named_parameters()
        ]
        assert sorted(listed) == sorted(name for name, _ in network.named_parameters())
    assert ARCHITECTURE.groups(pair()[0], TINY)[0][1] == ["main.6"]
    assert ARCHITECTURE.groups(pair()[1], TINY)[1][1] == ["main.2", "main.3"]


def test_modulated_layers_start_as_the_source() -> None:
    generator, _ = pair()
    z, expected = normal(4, 7), pair()[0](normal(4, 7))
    names = [name for _, modules in ARCHITECTURE.groups(generator, TINY) for name in modules]
    modulated = ARCHITECTURE.modulated(generator, names)
    assert sorted(modulated) == ["main.0", "main.3", "main.6"]
    for name in modulated:
        generator.set_submodule(name, AdaFMConvTranspose2d.from_module(generator.get_submodule(name)))
    assert torch.equal(generator(z), expected)
    with torch.no_grad():
        generator.main[3].gamma.mul_(1.5)
    assert not torch.allclose(generator(z), expected)


def other_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers numbered from 1 with the kind in front, as the second outside file has them."""
    renamed = {}
    for name, value in state.items():
        _, place, leaf = name.split(".")
        kind = "convTr" if int(place) % 3 == 0 else "batchNorm"
        renamed[f"{kind}{int(place) // 3 + 1}.{leaf}"] = value
    return renamed


@pytest.mark.parametrize("names", [dict, other_names, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_published_names_load_exactly(names) -> None:
    cfg = DCGANConfig(size=32, z_dim=9, ngf=3, ndf=5, channels=1)
    generator, discriminator = pair(cfg)
    published = {"generator": names(generator.state_dict()), "discriminator": discriminator.state_dict()}
    assert infer("dcgan", published) == cfg
    assert infer("dcgan", {"generator_test": published["generator"]}) == DCGANConfig("dcgan", 32, 1, 9, 3, 3)
    target = pair(cfg, seed=1)[0]
    assert load_matching(target, rename("generator", published["generator"])).exact
    assert torch.equal(target.eval()(normal(2, 9)), generator.eval()(normal(2, 9)))


def test_files_of_other_networks_are_refused() -> None:
    state = pair()[0].state_dict()
    with pytest.raises(SourceError, match="holds no generator"):
        infer("dcgan", {"discriminator": state})
    with pytest.raises(SourceError, match="the generator has 0 filters .* is it really of --arch dcgan"):
        infer("dcgan", {"generator": {"fc.weight": torch.zeros(3, 3)}})
    with pytest.raises(SourceError, match=r"first filter is \[7, 5, 4, 4\]; with 3 layers"):
        infer("dcgan", {"generator": {**state, "main.0.weight": torch.zeros(7, 5, 4, 4)}})
    with pytest.raises(SourceError, match=r"the discriminator has no main.0.weight"):
        infer("dcgan", {"generator": state, "discriminator": {}})


def test_bad_descriptions_and_inputs_are_refused() -> None:
    for values, message in (
        ({"size": 48}, "size is 48"),
        ({"size": 8}, "size is 8"),
        ({"classes": 10}, "classes is 10; arch dcgan is unconditional"),
        ({"ngf": 0}, "ngf is 0"),
        ({"width": 3}, "unknown field width"),
        ({"arch": "resnet"}, "arch is 'resnet'"),
    ):
        with pytest.raises(ValueError, match=message):
            ARCHITECTURE.describe(values)
    assert ARCHITECTURE.describe(TINY.to_json()) == TINY
    generator, discriminator = pair()
    with pytest.raises(ValueError, match=r"z has shape \(2, 8\); expected \[B, 7\]"):
        generator(normal(2, 8))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\); expected \[B, 3, 16, 16\]"):
        discriminator(normal(2, 3, 8, 8))
    with pytest.raises(ValueError, match="labels of shape"):
        generator(normal(2, 7), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="noise has shapes"):
        generator(normal(2, 7), None, [normal(2, 1, 4, 4)])


@pytest.mark.parametrize("name", GENERATORS)
def test_outside_generators_draw(name: str) -> None:
    try:
        path = packaged_file(*GENERATORS[name])
    except UsageError as error:
        pytest.skip(str(error))
    entries = torch.load(path, map_location="cpu", weights_only=True)
    state = entries.get("netG_state_dict", entries)
    assert infer("dcgan", {"generator": state}) == DCGANConfig()
    generator = ARCHITECTURE.generator(DCGANConfig())
    assert load_matching(generator, rename("generator", state)).exact
    with torch.no_grad():
        images = generator.eval()(normal(64, 100))
    assert 0.2 < float(images.std()) < 0.9, "faces, and not a flat or saturated field"
    assert float(images.std(dim=0).mean()) > 0.2, "different ones"
