"""Description of a WGAN-GP residual pair as TransferGAN uses it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .description import check_counts, from_json

ARCH = "wgan-resnet"
CONDITIONINGS = ("batchnorm", "concatenate")
STATISTICS = ("batch", "running")


@dataclass(frozen=True)
class WganResNetConfig:
    """Sizes of a WGAN-GP residual pair (Gulrajani et al., NeurIPS 2017; Wang et al., ECCV 2018).

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    arch: str = ARCH
    size: int = 64
    """Image side in pixels: a power of two from 16. Each doubling from 4 pixels is one residual block."""
    channels: int = 3
    """Image channels."""
    dim: int = 64
    """Base width: channels of the maps at full resolution."""
    z_dim: int = 128
    """Size of the latent vector."""
    classes: int = 0
    """Labels; 0 for an unconditional pair. Otherwise the critic has an auxiliary classifier."""
    conditioning: str = "batchnorm"
    """How the generator gets a label: batchnorm (scales and offsets of its class) or concatenate (to the latent)."""
    statistics: str = "batch"
    """Of the generator's normalisation outside training: batch (as published: always those of the batch at hand, so an
    image depends on its neighbours) or running (averages of training)."""

    def __post_init__(self) -> None:
        if self.arch != ARCH:
            raise ValueError(f"arch is {self.arch!r}; expected {ARCH}")
        check_counts(self, size=16, channels=1, dim=1, z_dim=1, classes=0)
        if self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}; arch {ARCH} makes powers of two from 16: 16, 32, 64, 128, ...")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning is {self.conditioning!r}; expected one of {', '.join(CONDITIONINGS)}")
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics is {self.statistics!r}; expected one of {', '.join(STATISTICS)}")

    @property
    def blocks(self) -> int:
        """Residual blocks of each network, one for each doubling from 4 pixels."""
        return self.size.bit_length() - 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at 4, 8, ... ``size`` pixels: ``dim`` at the image, doubled with each halving, at most 8 ``dim``."""
        return tuple(self.dim * min(2**k, 8) for k in range(self.blocks, -1, -1))

    @property
    def tables(self) -> int:
        """Rows of the generator's normalisation tables; 0 where it has a single scale and offset."""
        return self.classes if self.conditioning == "batchnorm" else 0

    @property
    def appended(self) -> int:
        """Label entries after the latent in the generator's first layer."""
        return self.classes if self.conditioning == "concatenate" else 0

    def to_json(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> WganResNetConfig:
        """Inverse of ``to_json``; ValueError names a field that is unknown or inadmissible."""
        return from_json(cls, values)
