"""BigGAN: description, both networks, and what the trainer is told about them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from adafm_trainer.errors import SourceError
from adafm_trainer.methods.losses import gradient_penalty
from adafm_trainer.models.biggan import ARCHITECTURE, BigGANDiscriminator, BigGANGenerator
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.spectral import spectral_layers
from biggans import CONFIGS, FLAT, HIER, SHARED_FLAT, discriminator, generator, same, single, snapshot

# --- description


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_description_survives_json(cfg):
    assert ARCHITECTURE.describe(json.loads(json.dumps(cfg.to_json()))) == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 48}, "size is 48; arch biggan makes 32, 64, 128, 256"),
        ({"arch": "resnet"}, "arch is 'resnet'"),
        ({"channels": 2}, "channels is 2"),
        ({"ch": 0}, "ch is 0"),
        ({"d_ch": 0}, "d_ch is 0"),
        ({"classes": 0}, "classes is 0"),
        ({"z_dim": 10}, "z_dim is 10; .* take 8 or 12"),
        ({"shared_dim": 0}, "hier is true and shared_dim 0"),
        ({"shared_dim": -1}, "shared_dim is -1"),
        ({"g_attention": (64,)}, "g_attention has 64; at 32 pixels the maps have sides 8, 16, 32"),
        ({"ch": 1}, "g_attention has 16, where maps have 4 channels"),
        ({"sn_eps": 0.0}, "eps is 0.0"),
        ({"sn_iterations": 0}, "iterations is 0"),
        ({"bn_eps": 0.0}, "bn_eps is 0.0"),
        ({"init": "he"}, "init is 'he'"),
    ],
)
def test_a_bad_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HIER, **changes)


def test_a_bad_json_description_is_named():
    with pytest.raises(ValueError, match="unknown field width"):
        ARCHITECTURE.describe({"size": 32, "width": 3})
    with pytest.raises(ValueError, match="lacks size"):
        ARCHITECTURE.describe({"arch": "biggan"})


# --- networks


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_sides_of_every_size(size):
    chunks = {32: 4, 64: 5, 128: 6, 256: 7}[size]
    cfg = BigGANConfig(size=size, ch=1, z_dim=2 * chunks, classes=2, shared_dim=3, g_attention=(), d_attention=())
    images = ARCHITECTURE.generator(cfg)(torch.randn(2, cfg.z_dim), torch.tensor([0, 1]))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    assert ARCHITECTURE.discriminator(cfg)(images, torch.tensor([0, 1])).shape == (2,)


def test_the_published_size_has_the_published_number_of_parameters():
    """The counts that the published PyTorch code prints for ImageNet at 128 pixels, with 96 channels."""
    with torch.device("meta"):
        networks = [build(BigGANConfig(size=128, init="N02")) for build in (BigGANGenerator, BigGANDiscriminator)]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [70_433_988, 87_982_370]


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_tanh_is_outside_pre_tanh_and_no_label_is_class_zero(cfg):
    network, z = generator(cfg).eval(), torch.randn(3, cfg.z_dim)
    images = network(z)
    assert images.shape == (3, cfg.channels, cfg.size, cfg.size)
    assert torch.equal(images, torch.tanh(network.pre_tanh(z)))
    assert torch.equal(images, network(z, torch.zeros(3, dtype=torch.int64)))
    if cfg.classes > 1:
        assert not torch.equal(images, network(z, torch.ones(3, dtype=torch.int64)))


def test_an_embedding_stands_for_its_label():
    network, z, y = generator().eval(), torch.randn(3, 8), torch.tensor([2, 0, 1])
    assert torch.equal(network(z, y), network(z, network.shared(y)))
    with pytest.raises(ValueError, match=r"y has shape \(3, 4\); expected class embeddings \[3, 5\]"):
        network(z, torch.randn(3, 4))
    with pytest.raises(ValueError, match="no shared class embedding"):
        generator(FLAT)(torch.randn(3, 6), torch.randn(3, 5))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 3, 1]), "label 3; the network knows the classes 0 to 2"),
        (torch.tensor([0, -1, 1]), "label -1"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([True, False, True]), "type torch.bool"),
    ],
)
def test_bad_labels_are_named(y, message):
    with pytest.raises(ValueError, match=message):
        generator()(torch.randn(3, 8), y)
    with pytest.raises(ValueError, match=message):
        discriminator()(torch.randn(3, 3, 32, 32), y)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"z has shape \(2, 9\); expected \[B, 8\]"):
        generator()(torch.randn(2, 9))
    with pytest.raises(ValueError, match="noise has shapes"):
        generator()(torch.randn(2, 8), None, [torch.randn(2, 1, 4, 4)])
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 32, 32\); expected \[B, 3, 32, 32\]"):
        discriminator()(torch.randn(2, 1, 32, 32))


def test_eval_mode_stores_nothing_and_train_mode_does():
    z, x, y = torch.randn(3, 8), torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    # Orthogonal matrices converge in one iteration, and their vectors then stand still.
    cfg = dataclasses.replace(HIER, init="N02")
    for network, inputs in ((generator(cfg), (z, y)), (discriminator(cfg), (x, y))):
        before, first = snapshot(network.eval()), network(*inputs)
        assert torch.equal(first, network(*inputs)) and same(before, snapshot(network))
        with torch.no_grad():
            network.train()(*inputs)
        moved = {name for name, value in snapshot(network).items() if not torch.equal(value, before[name])}
        # With one output there is one singular value, found at once.
        moving = {name for name, _ in network.named_buffers() if not single(network, name)}
        assert len(moving) > 30 and moved >= moving
        assert not moved & {name for name, _ in network.named_parameters()}


def test_without_labels_the_class_embedding_has_no_part():
    network, x = discriminator(), torch.randn(2, 3, 32, 32)
    before = snapshot(network.embed)
    network(x).sum().backward()
    assert network.embed.weight.grad is None and same(before, snapshot(network.embed))
    network.zero_grad()
    network(x, torch.tensor([1, 1])).sum().backward()
    assert network.embed.weight.grad[1].any() and not same(before, snapshot(network.embed))


def test_initial_weights():
    ortho = generator(HIER).blocks[0][0].conv1.weight.flatten(1)
    torch.testing.assert_close(ortho @ ortho.t(), torch.eye(len(ortho)), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    assert abs(ARCHITECTURE.generator(SHARED_FLAT).linear.weight.std() - 0.02) < 2e-3


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_checkpointed_activations_give_the_same_bits_and_move_buffers_once(cfg):
    z, y, x = torch.randn(3, cfg.z_dim), torch.arange(3) % cfg.classes, torch.randn(3, cfg.channels, cfg.size, cfg.size)

    def run(checkpointed):
        g, d = generator(cfg), discriminator(cfg)
        g.checkpoint_activations = d.checkpoint_activations = checkpointed
        # Two forwards before the backward: each is computed again with the weights that it had.
        image = x.clone().requires_grad_()
        real, fake = d(image, y), d(g(z, y), y)
        (gradient_penalty(real, image).sum() + real.sum() - fake.sum()).backward()
        grads = [p.grad for network in (g, d) for p in network.parameters()]
        return grads, {**snapshot(g), **{f"d.{name}": value for name, value in snapshot(d).items()}}

    (plain, state), (again, state_again) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert any(gradient.any() for gradient in plain)
    assert same(state, state_again)


def test_bf16_autocast_is_close():
    network, z = generator().eval(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(z)
    assert (found.float() - network(z)).abs().max() < 0.03


# --- what the trainer is told


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_groups_hold_every_parameter_once_image_side_first(cfg):
    for network, first, last in (
        (generator(cfg), "output_layer", "linear"),
        (discriminator(cfg), "blocks.0", "linear"),
    ):
        listed = ARCHITECTURE.groups(network, cfg)
        found = [id(p) for _, names in listed for name in names for p in network.get_submodule(name).parameters()]
        assert sorted(found) == sorted(map(id, network.parameters()))
        assert (listed[0][0], listed[-1][0]) == (first, last)
    assert ARCHITECTURE.modulated(discriminator(cfg), ["blocks.1", "linear"]) == [
        "blocks.1.0.conv1",
        "blocks.1.0.conv2",
    ]


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "parallel"])
def test_published_tensors_tell_the_description(cfg, prefix):
    networks = {"average": generator(cfg), "discriminator": discriminator(cfg)}
    published = {
        name: {prefix + key: value for key, value in snapshot(network).items()} for name, network in networks.items()
    }
    states = {name: ARCHITECTURE.rename(name, state) for name, state in published.items()}
    found = ARCHITECTURE.infer("biggan", states)
    assert dataclasses.replace(found, init=cfg.init) == cfg
    assert all(same(state, snapshot(networks[name])) for name, state in states.items())
    alone = ARCHITECTURE.infer("biggan", {"generator": states["average"]})
    assert (alone.z_dim, alone.classes, alone.g_attention) == (cfg.z_dim, cfg.classes, cfg.g_attention)


def test_tensors_that_tell_no_description_are_named():
    state = snapshot(generator())
    with pytest.raises(SourceError, match="holds no generator"):
        ARCHITECTURE.infer("biggan", {"discriminator": snapshot(discriminator())})
    with pytest.raises(SourceError, match=r"no tensor output_layer\.2\.weight"):
        ARCHITECTURE.infer("biggan", {"generator": {k: v for k, v in state.items() if k != "output_layer.2.weight"}})
    with pytest.raises(SourceError, match="has 2 blocks"):
        ARCHITECTURE.infer("biggan", {"generator": {k: v for k, v in state.items() if "blocks.2" not in k}})
    with pytest.raises(SourceError, match="the discriminator has 5 blocks"):
        ARCHITECTURE.infer("biggan", {"generator": state, "discriminator": snapshot(discriminator(FLAT))})
    with pytest.raises(SourceError, match="takes 9 values"):
        changed = {**state, "blocks.0.0.bn1.gain.weight": torch.ones(8, 9)}
        ARCHITECTURE.infer("biggan", {"generator": changed})


def test_every_layer_but_the_tables_of_classes_is_normalised():
    for cfg in (HIER, FLAT):
        network = generator(cfg)
        plain = {
            name
            for name, module in network.named_modules()
            if hasattr(module, "weight") and module not in spectral_layers(network)
        }
        tables = (
            {"shared"} if cfg.shared_dim else {n for n, _ in network.named_modules() if n[-5:] in (".gain", ".bias")}
        )
        assert plain == tables
