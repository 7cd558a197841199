"""Which images make up a batch: a counter-based sampler that needs no state of its own."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from adafm_trainer import keyed

_STREAM = "data-order"


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    order = keyed.permutation(seed, _STREAM, epoch, n)
    order.flags.writeable = False
    return order


def indices(seed: int, position: int, count: int, n: int) -> torch.Tensor:
    """Indices of images number ``position`` to ``position + count - 1`` of an endless stream over a set of ``n``.

    The stream is one keyed permutation of ``range(n)`` after another, so every image comes once per epoch and the last,
    incomplete batch of an epoch is filled from the next one. The result depends on nothing but the arguments:
    ``indices(s, p, a + b, n) == cat(indices(s, p, a, n), indices(s, p + a, b, n))``. Returns int64 ``[count]``.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 (the number of images in the set), got {n}")
    if position < 0 or count < 0:
        raise ValueError(f"position and count must not be negative, got {position} and {count}")
    parts = []
    while count > 0:
        epoch, offset = divmod(position, n)
        part = _order(seed, epoch, n)[offset : offset + count]
        parts.append(part)
        position += len(part)
        count -= len(part)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)
