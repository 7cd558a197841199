"""Small images, and draws of an augmentation with chosen values."""

from __future__ import annotations

import torch
from adafm_trainer.methods.augment import make_augment

BLIT = ("flip", "turn", "move")
WARP = ("scale", "rotate_before", "stretch", "rotate_after", "shift")


def ada(p, channels=3, size=8, **settings):
    augment = make_augment("ada", channels, size, **settings)
    augment.p.fill_(p)
    return augment


def images(count=5, channels=3, size=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator, dtype=dtype) * 2 - 1


def column(augment, name):
    return [*augment.uniforms, *augment.normals].index(name)


def only(augment, draws, *gates):
    """The draws with every other transform of ``ada`` shut, whatever p is."""
    draws = draws.clone()
    for gate in augment.gates:
        if gate not in gates:
            draws[:, column(augment, f"if_{gate}")] = 1.0
    return draws


def with_values(augment, draws, **values):
    draws = draws.clone()
    for name, value in values.items():
        draws[:, column(augment, name)] = torch.as_tensor(value, dtype=draws.dtype)
    return draws


def bits(x):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(whole)
