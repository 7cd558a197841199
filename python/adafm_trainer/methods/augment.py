"""Augmentation of what the discriminator sees, by name.

Real and generated images pass the same random transforms before D, in D's step and in G's, so that D cannot memorise
few real images while G is still asked for images as they are (Zhao et al. and Karras et al., both NeurIPS 2020). That
is not ``--aug flip``, which ``data.prepare`` does to real images alone: it enlarges the data, and G learns to make
mirrored images too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UsageError
from .augment_ada import AdaptiveAugment
from .augment_base import Augment, Draws
from .augment_diff import DiffAugment

__all__ = ["NAMES", "AdaptiveAugment", "Augment", "DiffAugment", "Draws", "make_augment"]

Exchange = Callable[[list[Tensor]], None]


_AUGMENTS = {cls.name: cls for cls in (DiffAugment, AdaptiveAugment)}
NAMES = tuple(_AUGMENTS)


def make_augment(
    name: str,
    channels: int,
    size: int,
    device: torch.device | str = "cpu",
    *,
    target: float = 0.6,
    interval: int = 4,
    images: int = 500_000,
    exchange: Exchange | None = None,
) -> Augment:
    """The augmentation called ``name``, one of NAMES, for images ``[B, channels, size, size]`` on ``device``.

    ``target``, ``interval``, ``images`` and ``exchange`` belong to ada (``AdaptiveAugment``); the others ignore them.

    Raises:
        UsageError: an unknown name, or images or settings that the augmentation has no meaning for.
    """
    if name not in _AUGMENTS:
        raise UsageError(f"--aug is {name!r}; it must be one of {', '.join(NAMES)}")
    settings = {"target": target, "interval": interval, "images": images, "exchange": exchange}
    try:
        return _AUGMENTS[name](channels, size, device, **(settings if name == AdaptiveAugment.name else {}))
    except ValueError as error:
        raise UsageError(str(error)) from error
