"""Small BigGAN networks whose every part takes part, and comparisons of their states."""

from __future__ import annotations

import torch
from adafm_trainer.models.biggan import ARCHITECTURE, BigGANDiscriminator, BigGANGenerator
from adafm_trainer.models.biggan_config import BigGANConfig
from adafm_trainer.models.biggan_layers import SelfAttention

HIER = BigGANConfig(size=32, ch=2, z_dim=8, classes=3, shared_dim=5, g_attention=(16,), d_attention=(16,))
FLAT = BigGANConfig(
    size=64,
    channels=1,
    ch=2,
    d_ch=1,
    z_dim=6,
    classes=4,
    shared_dim=0,
    hier=False,
    g_attention=(8, 32),
    d_attention=(4,),
)
SHARED_FLAT = BigGANConfig(size=32, ch=2, z_dim=7, classes=1, shared_dim=4, hier=False, init="N02", sn_values=2)
CONFIGS = {"hier": HIER, "flat": FLAT, "shared_flat": SHARED_FLAT}


def generator(cfg: BigGANConfig = HIER, seed: int = 0) -> BigGANGenerator:
    """A generator whose attention takes part and whose statistics and vectors are no longer those of the start."""
    torch.manual_seed(seed)
    network = ARCHITECTURE.generator(cfg)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, SelfAttention):
                module.gamma.fill_(0.7)
        network(torch.randn(4, cfg.z_dim), torch.arange(4) % cfg.classes)
    return network


def discriminator(cfg: BigGANConfig = HIER, seed: int = 0) -> BigGANDiscriminator:
    torch.manual_seed(seed)
    network = ARCHITECTURE.discriminator(cfg)
    for module in network.modules():
        if isinstance(module, SelfAttention):
            torch.nn.init.constant_(module.gamma, 0.7)
    return network


def snapshot(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def single(network: torch.nn.Module, buffer: str) -> bool:
    """Whether a buffer belongs to a normalised layer of one output."""
    layer = network.get_submodule(buffer.rpartition(".")[0])
    return hasattr(layer, "u0") and layer.u0.numel() == 1


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
