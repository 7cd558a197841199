"""Small GAN memories for the tests: pairs made of random sources, and banks of tasks."""

import torch
from adafm_trainer.models.config import ModelConfig
from adafm_trainer.models.gpgan import build_discriminator, build_generator
from adafm_trainer.models.memory import MemoryDiscriminator, MemoryGenerator, load_source
from adafm_trainer.models.memory_bank import MemoryBank
from adafm_trainer.models.memory_config import MemoryConfig
from tiny import MODEL

# Seven stages, of which the first four are stored in low rank.
WIDE = ModelConfig(arch="resnet4", size=64, nf=2, z_dim=6)


def source_pair(cfg=MODEL, dtype=torch.float64):
    torch.manual_seed(3)
    return build_generator(cfg).to(dtype), build_discriminator(cfg).to(dtype)


def memory_pair(cfg, dtype=torch.float64):
    """A memory pair of a random source, its modulation moved away from where it starts."""
    networks = [kind(cfg).to(dtype) for kind in (MemoryGenerator, MemoryDiscriminator)]
    for network, source in zip(networks, source_pair(cfg.source, dtype), strict=True):
        load_source(network, source.state_dict())
        moved(network, seed=5)
    return networks


@torch.no_grad()
def moved(network, seed):
    """Change everything that trains a little."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in (p for p in network.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
        parameter.add_(0.05 * noise.to(parameter.dtype))
    return network


def latents(cfg, count=3, dtype=torch.float64):
    return torch.randn(count, cfg.z_dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def bank_of(count, cfg=None, storage="full"):
    """A bank of ``count`` tasks, and their generators as they were in training."""
    cfg = MemoryConfig(MODEL) if cfg is None else cfg
    source, _ = source_pair(cfg.source, torch.float32)
    bank, trained = MemoryBank(cfg, source.state_dict(), storage), {}
    for number in range(count):
        generator = MemoryGenerator(bank.next_model())
        bank.start(generator)
        trained[f"task{number}"] = moved(generator, seed=number)
        bank.add(f"task{number}", generator)
    return bank, trained, source.state_dict()
