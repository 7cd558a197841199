"""Random draws keyed by (seed, stream, step, sample index).

A draw depends on nothing else: neither on how many draws came before it, nor on how a batch is split over devices.
Resuming a run therefore needs no generator state, and a batch of two times eight samples equals one of sixteen.
The generator is Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): seed and stream
form its key, step and sample index its counter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch


def _generator(seed: int, stream: str, step: int, index: int) -> np.random.Generator:
    key = (seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(stream.encode()))
    return np.random.Generator(np.random.Philox(key=key, counter=(0, 0, step, index)))


def normal(seed: int, stream: str, step: int, indices: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal draws, one block of ``shape`` for each sample index: float32 ``[len(indices), *shape]``."""
    rows = [_generator(seed, stream, step, int(i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def uniform(seed: int, stream: str, step: int, indices: Iterable[int], shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Uniform draws in [0, 1), one block of ``shape`` for each sample index: float32 ``[len(indices), *shape]``."""
    rows = [_generator(seed, stream, step, int(i)).random(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.asarray(rows, dtype=np.float32)) if rows else torch.empty(0, *shape)


def permutation(seed: int, stream: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)`` for one epoch: int64 ``[n]``."""
    return _generator(seed, stream, epoch, 0).permutation(n)
