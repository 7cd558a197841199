"""Pairwise distances between feature rows, and the checks every metric makes on its input."""

from __future__ import annotations

import torch

BLOCK = 2048


def check_features(x: torch.Tensor, y: torch.Tensor | None = None, *, least: int = 1, what: str = "metric") -> None:
    """Raises TypeError or ValueError unless x and y are finite float64 ``[N, d]`` of one d, N at least ``least``."""
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.float64:
            found = rows.dtype if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise TypeError(f"{what}: features {name} must be a float64 tensor, got {found}")
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"{what}: features {name} must be [N, d], got {tuple(rows.shape)}")
        if len(rows) < least:
            raise ValueError(f"{what} needs at least {least} images in {name}, got {len(rows)}")
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows).all(dim=1)).sum())
            raise ValueError(f"{what}: {bad} of {len(rows)} feature rows in {name} hold NaN or infinity")
    if y is not None and x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{what}: features have {x.shape[1]} and {y.shape[1]} dimensions: they come from different extractors"
        )


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all rows: ``[N, d]``, ``[M, d]`` -> ``[N, M]``, float64.

    Computed as |a|^2 + |b|^2 - 2 a.b after both sets are moved by the mean of y. What is left of a zero distance by
    rounding is set to exactly 0, so equal rows are at distance 0.
    """
    centre = y.mean(dim=0)
    a, b = x - centre, y - centre
    squares_a, squares_b = a.square().sum(1)[:, None], b.square().sum(1)[None, :]
    squared = squares_a + squares_b - 2.0 * (a @ b.T)
    return torch.where(squared <= 1e-13 * (squares_a + squares_b), torch.zeros_like(squared), squared).sqrt()


def kth_neighbour(x: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of every row to its k-th nearest other row: ``[N, d]`` -> ``[N]``. Needs N > k >= 1."""
    if not 1 <= k < len(x):
        raise ValueError(f"the k-th neighbour needs 1 <= k < N, got k {k} and N {len(x)}")
    parts = []
    for start in range(0, len(x), BLOCK):
        block = distances(x[start : start + BLOCK], x)
        rows = torch.arange(len(block))
        block[rows, rows + start] = float("inf")
        parts.append(block.kthvalue(k, dim=1).values)
    return torch.cat(parts)
