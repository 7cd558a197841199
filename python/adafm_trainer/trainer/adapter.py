"""The adapter file: what a run changed of its source, how far gamma and beta have moved, and what else it found."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

from ..methods.augment_ada import AdaptiveAugment
from ..methods.config import TrainConfig
from ..models.memory import MemoryGenerator
from ..models.multi_mine import MultiMinedGenerator
from .assemble import Assembly

_MODULATED = (AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear)


def save_adapter(folder: Path, assembly: Assembly, config: TrainConfig) -> Path:
    """Write ``adapter.safetensors``: the averaged generator's trained tensors by their state-dict names.

    Loading them over the source generator (modulated as the run's config says) gives the adapted generator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = assembly.method.generator_groups(assembly.networks, config)
    names = {name for group in groups for name in group.parameters}
    tensors = {k: v.detach().cpu().contiguous() for k, v in assembly.average.module.named_parameters() if k in names}
    metadata = {"method": assembly.method.name, "model": json.dumps(assembly.networks.model.to_json())}
    path = folder / "adapter.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


@torch.no_grad()
def identity_distance(module: nn.Module) -> dict[str, float]:
    """Root mean square of gamma - 1 and of beta over every modulated layer; nothing where there is none, and nothing of
    a GAN memory, whose gamma and beta start at the source's deviations and means."""
    if isinstance(module, MemoryGenerator):
        return {}
    layers = [m for m in module.modules() if isinstance(m, _MODULATED)]
    if not layers:
        return {}
    count = sum(m.gamma.numel() for m in layers)
    gamma = sum((m.gamma.double() - 1).square().sum().item() for m in layers)
    beta = sum(m.beta.double().square().sum().item() for m in layers)
    return {"gamma_distance": (gamma / count) ** 0.5, "beta_distance": (beta / count) ** 0.5}


def adapted_numbers(assembly: Assembly) -> dict[str, float | list[float]]:
    """What a run finds out beside its weights: ``p``, the estimated probability of each of several mined sources;
    ``aug_p`` and ``aug_r``, the probability of adaptive augmentation and what it follows."""
    found: dict[str, float | list[float]] = {}
    if isinstance(assembly.networks.generator, MultiMinedGenerator):
        found["p"] = assembly.networks.generator.p.tolist()
    if isinstance(assembly.augment, AdaptiveAugment):
        found |= {"aug_p": assembly.augment.p.item(), "aug_r": assembly.augment.r.item()}
    return found
