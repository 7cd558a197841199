"""Every network family by the name in ``arch``, and what is done with a pair whatever its family."""

from __future__ import annotations

from typing import Any

from torch import nn

from .architecture import Architecture, Description, Groups
from .memory import ARCHITECTURE as MEMORY
from .mined_pair import ARCHITECTURE as MINED
from .mined_pair import MinedConfig
from .source_families import SOURCE_FAMILIES, described, find

ARCHITECTURES = (*SOURCE_FAMILIES, MEMORY, MINED)


def architecture(arch: str) -> Architecture:
    """The family that ``arch`` belongs to; ValueError names those there are."""
    return find(arch, ARCHITECTURES)


def describe(values: dict[str, Any]) -> Description:
    """A description from the JSON values of its ``to_json``; ValueError or TypeError names what is wrong in them."""
    return described(values, ARCHITECTURES)


def build_generator(cfg: Description) -> nn.Module:
    """The generator that ``cfg`` describes, with the family's random weights."""
    return architecture(cfg.arch).generator(cfg)


def build_discriminator(cfg: Description) -> nn.Module:
    """The discriminator that ``cfg`` describes, with the family's random weights."""
    return architecture(cfg.arch).discriminator(cfg)


def published_loss(cfg: Description) -> str:
    """The adversarial loss that the family of ``cfg`` was published with; of a mined pair, that of its first source."""
    family = cfg.described[0].arch if isinstance(cfg, MinedConfig) else cfg.arch
    return architecture(family).loss


def groups(module: nn.Module, cfg: Description) -> Groups:
    """Name and modules of every group of a network, image side first; see ``Architecture.groups``."""
    return architecture(cfg.arch).groups(module, cfg)
