"""Parameter names of the released AdaFM code beside ours, both ways.

The released blocks hold gamma and beta as ``style_gama`` and ``style_beta`` of modules ``small_adafm_0`` and
``small_adafm_1`` beside ``conv_0`` and ``conv_1``; ours are ``gamma`` and ``beta`` of the modulated convolution itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_LEAVES = {
    f"small_adafm_{i}.{theirs}": f"conv_{i}.{ours}"
    for i in (0, 1)
    for theirs, ours in (("style_gama", "gamma"), ("style_beta", "beta"))
}
_REVERSED = {ours: theirs for theirs, ours in _LEAVES.items()}


def from_reference(name: str) -> str:
    """Our name of a released parameter; other names are returned as they are."""
    return _renamed(name, _LEAVES)


def to_reference(name: str) -> str:
    """The released name of one of our parameters; other names are returned as they are."""
    return _renamed(name, _REVERSED)


def state_from_reference(state: Mapping[str, T]) -> dict[str, T]:
    """A state dictionary under our names."""
    return {from_reference(name): value for name, value in state.items()}


def state_to_reference(state: Mapping[str, T]) -> dict[str, T]:
    """A state dictionary under the released names."""
    return {to_reference(name): value for name, value in state.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".")
    leaf = ".".join(parts[-2:])
    return ".".join([*parts[:-2], table[leaf]]) if leaf in table else name
