"""Images from a generator, each a function of (seed, stream, index) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import keyed


def draw_latents(generator: nn.Module, seed: int, stream: str, step: int, indices: Sequence[int]) -> Tensor:
    """Standard normal latents ``[len(indices), z_dim]``, float32 on the CPU."""
    return keyed.normal(seed, f"{stream}/z", step, indices, (generator.z_dim,))


def draw_labels(generator: nn.Module, indices: Sequence[int]) -> Tensor | None:
    """Labels ``[len(indices)]`` that go through the classes in turn; None for a generator that is given none."""
    classes = getattr(generator, "sample_classes", 0)
    return torch.tensor([index % classes for index in indices]) if classes else None


def draw_noise(
    generator: nn.Module, seed: int, stream: str, step: int, indices: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """The noise maps the generator injects, in order of use; None for a generator without any."""
    shapes = generator.noise_shapes
    if not shapes:
        return None
    return tuple(keyed.normal(seed, f"{stream}/noise{k}", step, indices, (1, *shape)) for k, shape in enumerate(shapes))


@torch.no_grad()
def generate(
    generator: nn.Module,
    seed: int,
    stream: str,
    indices: Sequence[int],
    *,
    autocast: torch.dtype | None = None,
    batch: int = 50,
) -> Tensor:
    """Images ``[len(indices), C, H, W]`` in [-1, 1], float32 on the CPU.

    Image ``i`` depends on ``(seed, stream, i)`` and on the weights, up to rounding of the batched convolutions. Where a
    generator normalises by the batch at hand (``batch_statistics``), the batch of image i is always the one of indices
    that have the same quotient by ``batch``, whichever of them are asked for.
    """
    if getattr(generator, "batch_statistics", False):
        blocks = sorted({index // batch for index in indices})
        whole = [block * batch + k for block in blocks for k in range(batch)]
        place = {index: k for k, index in enumerate(whole)}
        return _generated(generator, seed, stream, whole, autocast, batch)[[place[index] for index in indices]]
    return _generated(generator, seed, stream, indices, autocast, batch)


def _generated(
    generator: nn.Module, seed: int, stream: str, indices: Sequence[int], autocast: torch.dtype | None, batch: int
) -> Tensor:
    device = next(generator.parameters()).device
    rows = []
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        z = draw_latents(generator, seed, stream, 0, part).to(device)
        y = draw_labels(generator, part)
        y = None if y is None else y.to(device)
        noise = draw_noise(generator, seed, stream, 0, part)
        if noise is not None:
            noise = tuple(n.to(device) for n in noise)
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            rows.append(generator(z, y, noise).float().cpu())
    return torch.cat(rows)
