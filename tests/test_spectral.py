"""Spectrally normalised layers, the BigGAN layers made of them, and AdaFM on top of the norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adafm_trainer.models.biggan import ARCHITECTURE
from adafm_trainer.models.biggan_config import BlockPlan
from adafm_trainer.models.biggan_layers import DiscriminatorBlock, SelfAttention
from adafm_trainer.models.spectral import (
    SpectralConv2d,
    SpectralEmbedding,
    SpectralLinear,
    SpectralNorm,
    modulate_spectral,
)
from biggans import CONFIGS, generator, same, snapshot

from adafm_kernels.nn import AdaFMConv2d

NORM = SpectralNorm()


@pytest.mark.parametrize("kind", ["conv", "linear", "embedding"])
def test_the_norm_converges_to_the_singular_values(kind):
    torch.manual_seed(0)
    norm = SpectralNorm(values=2, iterations=3, eps=1e-12)
    layer = {
        "conv": lambda: SpectralConv2d(3, 5, 3, norm=norm),
        "linear": lambda: SpectralLinear(7, 4, norm=norm),
        "embedding": lambda: SpectralEmbedding(6, 4, norm=norm),
    }[kind]().double()
    for _ in range(200):
        normalized = layer.normalized_weight()
    values = torch.linalg.svdvals(layer.weight.flatten(1))
    torch.testing.assert_close(normalized * values[0], layer.weight)
    torch.testing.assert_close(torch.cat([layer.sv0, layer.sv1]), values[:2], rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.normalized_weight().dtype == torch.float64


def test_layers_compute_with_the_normalized_weight():
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 5, 3, stride=2, padding=1, norm=NORM).eval()
    linear, table = SpectralLinear(7, 4, norm=NORM).eval(), SpectralEmbedding(6, 4, norm=NORM).eval()
    x, v, y = torch.randn(2, 3, 8, 8), torch.randn(2, 7), torch.tensor([5, 0])
    assert torch.equal(conv(x), F.conv2d(x, conv.normalized_weight(), conv.bias, 2, 1))
    assert torch.equal(linear(v), F.linear(v, linear.normalized_weight(), linear.bias))
    assert torch.equal(table(y), table.normalized_weight()[y])


def test_first_and_second_derivatives_for_the_input():
    torch.manual_seed(0)
    modules = [
        SelfAttention(8, NORM),
        DiscriminatorBlock(BlockPlan(8, 8, True, 2), False, NORM),
        DiscriminatorBlock(BlockPlan(8, 4, False, 4), True, NORM),
    ]
    torch.nn.init.ones_(modules[0].gamma)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    for module in modules:
        module.double().eval()
        assert torch.autograd.gradcheck(module, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(module, x, fast_mode=True)


def test_modulation_starts_at_the_function_of_eval_mode():
    torch.manual_seed(0)
    layer, x = SpectralConv2d(3, 5, 3, stride=2, padding=1, norm=NORM), torch.randn(2, 3, 8, 8)
    before = snapshot(layer)
    modulated = modulate_spectral(layer)
    assert modulated.training and layer.training and same(before, snapshot(layer))
    expected = layer.eval()(x)
    assert torch.equal(modulated(x), expected)
    assert modulated.bias is layer.bias and not modulated.weight.requires_grad
    torch.nn.init.normal_(modulated.gamma)
    torch.nn.init.normal_(modulated.beta)
    weight = modulated.gamma * layer.normalized_weight() + modulated.beta
    torch.testing.assert_close(modulated(x), F.conv2d(x, weight, layer.bias, 2, 1))
    with pytest.raises(TypeError, match="layer is a Conv2d"):
        modulate_spectral(torch.nn.Conv2d(3, 5, 3))


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_a_modulated_generator_starts_at_the_source(cfg):
    network, z = generator(cfg).eval(), torch.randn(3, cfg.z_dim)
    expected, target = network(z), copy.deepcopy(network)
    chosen = [name for _, names in ARCHITECTURE.groups(target, cfg)[:3] for name in names]
    names = ARCHITECTURE.modulated(target, chosen)
    last = len(network.blocks) - 1
    assert names == [f"blocks.{i}.0.{leaf}" for i in (last, last - 1) for leaf in ("conv1", "conv2")]
    for name in names:
        target.set_submodule(name, modulate_spectral(target.get_submodule(name)))
    assert sum(isinstance(layer, AdaFMConv2d) for layer in target.modules()) == 4
    assert torch.equal(target(z), expected)
    target.checkpoint_activations = True
    target.train()(z).sum().backward()
    assert all(target.get_submodule(name).gamma.grad.any() for name in names)
