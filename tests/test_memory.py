"""GAN memory's networks: the source's function after loading, what trains, sizes, plan mode, names, and the method."""

import dataclasses

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.methods.gan_memory import GanMemory
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.memory import (
    ARCHITECTURE,
    MemoryDiscriminator,
    MemoryGenerator,
    load_source,
    modulated_layers,
    modulation_parameters,
    task_parameters,
)
from adafm_trainer.models.memory_config import MemoryConfig
from adafm_trainer.models.memory_layers import RowLinear, ShiftedConv2d
from adafm_trainer.models.memory_names import state_from_reference, state_to_reference
from adafm_trainer.models.source import load_pair
from adafm_trainer.trainer.assemble import assemble
from memories import latents, memory_pair, source_pair
from tiny import MODEL, settings, source_folder
from torch import nn

from adafm_kernels import ModulationPlan

FAMILIES = [
    dataclasses.replace(MODEL, embed=3, nlabels=4),
    ModelConfig(arch="resnet2", size=32, nf=2, z_dim=5, embed=3, nlabels=2),
    ModelConfig(arch="resnet3", size=64, nf=1, z_dim=5),
    ModelConfig(arch="resnet4", size=64, nf=1, z_dim=6, embed=1),
]
# The source of the paper: resnet4, CelebA at 256 pixels.
PUBLISHED = ModelConfig(arch="resnet4", size=256, embed=1)


@pytest.mark.parametrize("cfg", FAMILIES, ids=lambda cfg: cfg.arch)
@pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "classes"])
def test_the_function_after_loading_is_the_sources(cfg, classes) -> None:
    generator, discriminator = source_pair(cfg)
    memory = MemoryConfig(cfg, classes=classes, normalise_d=True)
    own_g, own_d = MemoryGenerator(memory).double(), MemoryDiscriminator(memory).double()
    left_g, left_d = load_source(own_g, generator.state_dict()), load_source(own_d, discriminator.state_dict())
    z, y = latents(cfg), torch.tensor([0, 1, 0]) if classes or cfg.nlabels > 1 else None
    image = generator(z, torch.zeros(3, dtype=torch.int64) if classes else y)
    torch.testing.assert_close(own_g(z, y), image, rtol=0, atol=1e-12)
    assert set(left_g) == set(modulation_parameters(own_g))
    if classes and cfg.nlabels > 1:
        assert {"fc.weight", "fc.bias"} <= set(left_d)
    else:
        expected = discriminator(image, None if classes else y)
        torch.testing.assert_close(own_d(image, y), expected, rtol=0, atol=1e-12)
    for _, layer in modulated_layers(own_g):
        dims = (1,) if isinstance(layer, RowLinear) else (2, 3)
        deviation, mean = torch.std_mean(layer.weight, dims)
        torch.testing.assert_close(deviation, torch.ones_like(deviation))
        assert mean.abs().max() < 1e-12


def test_the_published_start_of_classes_is_random() -> None:
    generator, discriminator = source_pair(FAMILIES[3])
    cfg = MemoryConfig(FAMILIES[3], classes=3, embedding=0.8393, class_init="uniform", normalise_d=True)
    own_g, own_d = MemoryGenerator(cfg).double(), MemoryDiscriminator(cfg).double()
    before = own_d.fc.weight.detach().clone()
    load_source(own_g, generator.state_dict())
    assert {"fc.weight", "fc.bias"} <= set(load_source(own_d, discriminator.state_dict()))
    assert torch.equal(own_d.fc.weight, before)
    assert 0 < own_g.class_bias.weight.abs().max() <= 3**-0.5


def test_a_constant_kernel_is_guarded() -> None:
    generator, _ = source_pair()
    with torch.no_grad():
        for parameter in (generator.get_submodule("resnet.0").conv_0.weight[1, 2], generator.fc.weight[3]):
            parameter.fill_(0.25)
    own = MemoryGenerator(MemoryConfig(MODEL)).double()
    load_source(own, generator.state_dict())
    assert all(parameter.isfinite().all() for parameter in own.parameters())
    torch.testing.assert_close(own(latents(MODEL)), generator(latents(MODEL)), rtol=0, atol=1e-12)


def test_what_trains_is_the_modulation_and_the_discriminators_fc() -> None:
    generator, discriminator = memory_pair(MemoryConfig(MODEL))
    blocks = [f"resnet.{n}" for n in (0, 2, 4)]
    leaves = [f"{b}.conv_{i}.{leaf}" for b in blocks for i in (0, 1) for leaf in ("gamma", "beta", "shift")]
    of_g = {name for name, p in generator.named_parameters() if p.requires_grad}
    of_d = {name for name, p in discriminator.named_parameters() if p.requires_grad}
    assert of_g == {*leaves, "fc.gamma", "fc.beta", "fc.shift"}
    assert of_d == {*leaves, "fc.weight", "fc.bias"}
    conditional = MemoryGenerator(MemoryConfig(MODEL, classes=2))
    of_g = {name for name, p in conditional.named_parameters() if p.requires_grad}
    assert of_g == {*leaves, "fc.gamma", "fc.beta", "class_bias.weight", "class_bias.bias"}


def test_sizes_are_those_of_the_paper() -> None:
    def count(network, names=None):
        return sum(p.numel() for n, p in network.named_parameters() if names is None or n in names)

    with torch.device("meta"):
        cfg = MemoryConfig(PUBLISHED)
        generator, discriminator = MemoryGenerator(cfg), MemoryDiscriminator(cfg)
        conditional = MemoryGenerator(MemoryConfig(PUBLISHED, classes=6, embedding=0.8393))
    modulation = set(modulation_parameters(generator))
    assert (count(generator), count(generator, modulation)) == (62_710_980, 10_549_248)
    groups = {name: modules for name, modules in ARCHITECTURE.groups(generator, cfg)}
    sizes = {
        name: count(generator, {n for n in modulation for module in modules if n.startswith(f"{module}.")})
        for name, modules in groups.items()
    }
    assert sizes == {
        "conv_img": 0,
        "resnet_6": 16_512,
        "resnet_5": 24_704,
        "resnet_4": 98_560,
        "resnet_3": 393_728,
        "resnet_2": 1_573_888,
        "resnet_1": 4_196_352,
        "resnet_0": 4_196_352,
        "fc": 49_152,
    }
    assert (count(discriminator), count(discriminator, task_parameters(discriminator))) == (58_453_121, 10_517_441)
    assert count(conditional, set(modulation_parameters(conditional))) == 10_647_552


@pytest.mark.parametrize("classes", [0, 3], ids=["unconditional", "classes"])
def test_the_plan_gives_the_gradients_of_autograd(classes) -> None:
    cfg = MemoryConfig(dataclasses.replace(MODEL, nlabels=1), classes=classes, normalise_d=bool(classes))
    y = torch.tensor([0, 2, 1]) if classes else None

    def gradients(planned):
        found = {}
        networks = memory_pair(cfg)
        plans = [ModulationPlan(network).attach() for network in networks] if planned else []
        for plan in plans:
            plan.modulate()
            plan.zero_grad()
        generator, discriminator = networks
        image = generator(latents(cfg), y)
        (slope,) = torch.autograd.grad(discriminator(image, y).sum(), image, create_graph=True)
        (discriminator(image, y).sum() + slope.square().sum()).backward()
        for plan in plans:
            plan.reduce()
        for letter, network in zip("GD", networks, strict=True):
            found |= {f"{letter}.{n}": p.grad for n, p in network.named_parameters() if p.requires_grad}
        return found

    plain, planned = gradients(False), gradients(True)
    assert plain.keys() == planned.keys() and any(name.endswith(".shift") for name in plain)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(planned[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_computes_the_same(bias) -> None:
    torch.manual_seed(0)
    convolution = ShiftedConv2d.from_module(nn.Conv2d(3, 4, 3, padding=1, bias=bias))
    linear = RowLinear.from_module(nn.Linear(5, 4, bias=bias))
    for layer, x in ((convolution, torch.randn(2, 3, 6, 6)), (linear, torch.randn(2, 5))):
        for name, parameter in layer.named_parameters():
            nn.init.normal_(parameter) if name not in ("weight", "bias") else None
        merged = layer.merge()
        assert type(merged) in (nn.Conv2d, nn.Linear)
        assert torch.equal(merged(x), layer(x))
        layer.reset_modulation()
        plain = torch.nn.functional.linear if x.dim() == 2 else layer._conv_forward
        torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.bias))


def test_the_published_names_both_ways() -> None:
    generator, discriminator = memory_pair(MemoryConfig(FAMILIES[3], classes=2))
    for network in (generator, discriminator):
        state = network.state_dict()
        published = state_to_reference(state)
        back = state_from_reference(published)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert all(
            "AdaFM" in name for name in state_to_reference({n: state[n] for n in modulation_parameters(network)})
        )
    published = state_to_reference(generator.state_dict())
    assert published["AdaFM_fc.gamma"].shape == (1, 16)
    assert published["resnet_0_0.AdaFM_1.style_gama"].shape == (16, 16, 1, 1)


def test_a_label_enters_by_the_bias_alone() -> None:
    cfg = MemoryConfig(FAMILIES[3], classes=2, embedding=0.8393, class_init="uniform")
    generator, _ = memory_pair(cfg)
    z = latents(cfg, 2)
    one, other = generator(z, torch.tensor([0, 0])), generator(z, torch.tensor([0, 1]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])
    with torch.no_grad():
        shift = generator.class_bias.weight[:, 1] - generator.class_bias.weight[:, 0]
        generator.fc.bias.add_(shift)
    torch.testing.assert_close(generator(z, torch.tensor([0, 0]))[1], other[1])
    assert "embedding.weight" not in generator.state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": ModelConfig("adafm", 32, base="resnet2")}, "made of one of resnet"),
        ({"classes": -1}, "must not be negative"),
        ({"class_init": "ones"}, "zero or uniform"),
        ({"embedding": 0.8}, "class-conditional"),
        ({"components": {"resnet.0.conv_0": (1,)}}, "two numbers"),
        ({"arch": "resnet"}, "'memory'"),
    ],
)
def test_bad_descriptions_are_refused(change, words) -> None:
    with pytest.raises(ValueError, match=words):
        MemoryConfig(**{"source": MODEL, **change})


def test_descriptions_go_through_json() -> None:
    cfg = MemoryConfig(FAMILIES[3], classes=2, components={"resnet_0_0.conv_0": (2, 3)})
    assert MemoryConfig.from_json(cfg.to_json()) == cfg
    assert (cfg.size, cfg.channels, cfg.z_dim) == (64, 3, 6)
    with pytest.raises(ValueError, match="lacks its source"):
        MemoryConfig.from_json({"arch": "memory"})
    with pytest.raises(ValueError, match="unknown field colour"):
        MemoryConfig.from_json({**cfg.to_json(), "colour": 1})
    with pytest.raises(ValueError, match="no such convolution"):
        MemoryGenerator(MemoryConfig(MODEL, components={"resnet.9.conv_0": (1, 1)}))


def test_a_source_that_does_not_fit_is_refused() -> None:
    generator, _ = source_pair()
    state = generator.state_dict()
    own = MemoryGenerator(MemoryConfig(dataclasses.replace(MODEL, z_dim=7)))
    with pytest.raises(SourceError, match="in the source and"):
        load_source(own, state)
    del state["conv_img.bias"]
    with pytest.raises(SourceError, match=r"has no conv_img\.bias"):
        load_source(own, state)


@pytest.mark.parametrize("changes", [{}, {"classes": 3, "normalise_d": "off"}, {"freeze_g": 2, "freeze_d": 1}])
def test_the_method_trains_the_modulation_and_nothing_else(tmp_path, changes) -> None:
    pair = load_pair(source_folder(tmp_path / "source"))
    config, method = settings(tmp_path, **changes), GanMemory()
    torch.manual_seed(0)
    model = method.target_model([pair], config)
    networks = method.structure(model, config)
    method.initialise(networks, [pair], config, lambda _: None)
    before = [
        {n: t.clone() for n, t in net.state_dict().items()} for net in (networks.generator, networks.discriminator)
    ]
    assembly = assemble(method, networks, config)
    groups = {name for group in assembly.groups for name in group.parameters}
    labels = torch.tensor([0, 1, 2, 0]) if model.classes else None
    result = assembly.step.generator(latents(model, 4, torch.float32), labels)
    assembly.step.discriminator(torch.rand_like(result.images), result.images, labels)
    frozen = {"resnet.4"} if "freeze_g" in changes else set()
    for network, state in zip((networks.generator, networks.discriminator), before, strict=True):
        held = frozen if network is networks.generator else set()
        expected = {n for n in task_parameters(network) if n.rpartition(".conv")[0] not in held}
        changed = {n for n, t in network.state_dict().items() if not torch.equal(t.cpu(), state[n])}
        assert changed <= expected <= groups
        # Rows of labels that are not in the batch, and biases before the first D step, may stand still; others move.
        assert {n for n in expected if n.endswith((".gamma", ".beta"))} <= changed


def test_a_source_without_a_discriminator_is_refused(tmp_path) -> None:
    pair = dataclasses.replace(load_pair(source_folder(tmp_path / "source")), discriminator_state=None)
    config, method = settings(tmp_path), GanMemory()
    networks = method.structure(method.target_model([pair], config), config)
    with pytest.raises(SourceError, match="no discriminator"):
        method.initialise(networks, [pair], config, lambda _: None)
    with pytest.raises(SourceError, match="arch 'adafm'"):
        method.target_model([dataclasses.replace(pair, cfg=ModelConfig("adafm", 32, base="resnet2"))], config)
