"""From stored pixels to what the networks see: flip, scale to [-1, 1], dither."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adafm_trainer import keyed


def prepare(
    pixels: torch.Tensor,
    *,
    seed: int,
    step: int,
    sample_indices: torch.Tensor | Sequence[int],
    flip: bool,
    dither: bool,
    scale: float = 1.0,
) -> torch.Tensor:
    """``scale * (x / 127.5 - 1 + noise)``: uint8 ``[N, C, H, W]`` -> float32 ``[N, C, H, W]`` on the same device.

    flip: mirror each image with probability 1/2. dither: noise U[0, 1) / 128 per element, as the authors have it, so it
    is not centred and values may exceed 1 by up to 1/128; without it the noise is 0. Both draws are keyed by (seed,
    step, entry of ``sample_indices``), one entry per image: splitting a batch does not change them. ``scale`` below 1
    keeps flat white or black regions away from the saturated ends of a tanh.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise TypeError(f"pixels must be uint8 [N, C, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
    if len(sample_indices) != len(pixels):
        raise ValueError(f"one sample index per image: got {len(sample_indices)} indices for {len(pixels)} images")
    numbers = sample_indices.tolist() if isinstance(sample_indices, torch.Tensor) else list(sample_indices)
    if flip:
        mirrored = (keyed.uniform(seed, "flip", step, numbers) < 0.5).to(pixels.device)
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    images = pixels.to(torch.float32).div_(127.5).sub_(1.0)
    if dither:
        noise = keyed.uniform(seed, "dither", step, numbers, tuple(pixels.shape[1:]))
        images.add_(noise.to(images.device), alpha=1.0 / 128.0)
    return images.mul_(scale) if scale != 1.0 else images
