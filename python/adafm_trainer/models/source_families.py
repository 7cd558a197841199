"""The network families that a source can be of, by the name in ``arch``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .architecture import Architecture, Description
from .biggan import ARCHITECTURE as BIGGAN
from .dcgan import ARCHITECTURE as DCGAN
from .families import GPGAN
from .mnist import ARCHITECTURE as MNIST
from .wgan_conditional import CONDITIONAL
from .wgan_resnet import ARCHITECTURE as WGAN_RESNET

SOURCE_FAMILIES = (GPGAN, BIGGAN, dataclasses.replace(WGAN_RESNET, conditional=CONDITIONAL), DCGAN, MNIST)


def find(arch: str, among: Sequence[Architecture] = SOURCE_FAMILIES) -> Architecture:
    """The family that ``arch`` belongs to; ValueError names those there are."""
    for found in among:
        if arch in found.names:
            return found
    names = [name for family in among for name in family.names]
    raise ValueError(f"arch is {arch!r}; expected one of {', '.join(names)}")


def described(values: dict[str, Any], among: Sequence[Architecture] = SOURCE_FAMILIES) -> Description:
    """A description from the JSON values of its ``to_json``; ValueError or TypeError names what is wrong in them."""
    if "arch" not in values:
        raise ValueError(f"the description has no arch; its fields are {', '.join(values) or 'none'}")
    return find(values["arch"], among).describe(values)
