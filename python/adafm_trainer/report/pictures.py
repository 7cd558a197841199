"""Pictures that the report shows beside the trainer's own grids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data.grid import save_grid


def nearest_pairs(
    fakes: Tensor, training: Tensor, indices: Tensor, distances: Tensor, path: str | Path, columns: int = 8
) -> Path:
    """PNG of generated images, each over its nearest training image, closest pair first.

    ``fakes`` and ``training`` are uint8 ``[N, C, H, W]`` and ``[M, C, H, W]``; ``indices`` and ``distances`` ``[N]``.
    """
    order = distances.argsort()
    fakes, nearest = fakes[order], training[indices[order]]
    count, channels, side, width = fakes.shape
    rows = []
    gap = torch.full((columns, channels, max(2, side // 8), width), 255, dtype=torch.uint8)
    blank = torch.full((columns, channels, side, width), 255, dtype=torch.uint8)
    for start in range(0, count, columns):
        upper, lower = blank.clone(), blank.clone()
        part = slice(start, min(start + columns, count))
        upper[: part.stop - start], lower[: part.stop - start] = fakes[part], nearest[part]
        rows.append(torch.cat([upper, lower, gap], 2))
    return save_grid(path, torch.cat(rows), columns=columns)


def evolution(paths: list[Path], most: int = 8) -> list[Path]:
    """At most ``most`` of the sample grids, the first and the last among them, the others evenly between."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(k * (len(paths) - 1) / (most - 1))] for k in range(most)]
