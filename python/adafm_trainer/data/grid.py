"""Picture grids, and the one rounding from [-1, 1] to 8 bits that samples and metrics share."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Quantises images in [-1, 1] to uint8 of the same shape: ``(x * 127.5 + 128).clamp(0, 255)``, truncated.

    This is the rounding StyleGAN2-ADA measures with; a NaN becomes 0. uint8 input is returned as it is.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1] or uint8, got {images.dtype}")
    return torch.nan_to_num(images.detach().float(), nan=-2.0).mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def make_grid(images: torch.Tensor, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Lays images out row by row: ``[N, 1 or 3, H, W]``, float in [-1, 1] or uint8 -> uint8 ``[rows*H, columns*W, 3]``.

    ``columns`` defaults to the smallest square that holds all; cells left over are white. ``scale`` repeats pixels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"images must be [N, 1 or 3, H, W] with N > 0, got {tuple(images.shape)}")
    if (columns is not None and columns < 1) or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    pixels = to_uint8(images).cpu().numpy().transpose(0, 2, 3, 1)
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = np.broadcast_to(pixels, (count, height, width, 3)) if channels == 1 else pixels
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def save_grid(path: str | Path, images: torch.Tensor, columns: int | None = None, scale: int = 1) -> Path:
    """Writes ``make_grid(images, columns, scale)`` as a PNG: complete or not at all. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(make_grid(images, columns, scale)).save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
