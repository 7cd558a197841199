"""Description of a network pair: everything that is needed to build it, as JSON beside its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .description import from_json

GPGAN_FAMILIES = ("resnet", "resnet2", "resnet3", "resnet4")
SIDE_FACTORS = {"resnet2": 32, "resnet3": 64, "resnet4": 64}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a generator and discriminator pair.

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    arch: str
    """Family: resnet, resnet2, resnet3, resnet4 (Mescheder et al., ICML 2018), or adafm (Zhao et al., ICML 2020)."""
    size: int
    """Image side in pixels."""
    channels: int = 3
    """Image channels: 1 or 3."""
    nf: int = 64
    """Base width: channels of the feature maps at full resolution."""
    nf_max: int | None = None
    """Most channels of any map, family resnet only; None is 512 in the generator and 1024 in the discriminator."""
    z_dim: int = 256
    """Size of the latent vector."""
    embed: int = 0
    """Size of the label embedding that is joined to the latent; 0 for none."""
    nlabels: int = 1
    """Classes: rows of the embedding and logits of the discriminator."""
    base: str | None = None
    """arch adafm only: family of the source whose image-side groups are kept, and of the discriminator."""
    keep: int = 4
    """arch adafm only: groups kept from the source, counted from the image side (the m of GmDn)."""
    style_dim: int = 256
    """arch adafm only: size of the style vector."""
    s0: int | None = None
    """arch adafm only: side of the head's first map; None is 4, or half the side at the join where that is smaller."""
    small_h: str = "reference"
    """arch adafm only: the rescaling at the join, reference (weights near 1000, gradient 0.01) or calibrated."""

    def __post_init__(self) -> None:
        if self.arch not in (*GPGAN_FAMILIES, "adafm"):
            raise ValueError(f"arch is {self.arch!r}; expected one of {', '.join((*GPGAN_FAMILIES, 'adafm'))}")
        if self.arch == "adafm" and self.base not in GPGAN_FAMILIES:
            raise ValueError(f"base is {self.base!r}; arch adafm needs one of {', '.join(GPGAN_FAMILIES)}")
        if self.arch != "adafm" and self.base is not None:
            raise ValueError(f"base is {self.base!r}; it belongs to arch adafm, not {self.arch}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; expected 1 or 3")
        for name in ("size", "nf", "z_dim", "nlabels", "keep", "style_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("nf_max", "s0"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or None for the default")
        if self.nf_max is not None and self.nf_max < self.nf:
            raise ValueError(f"nf_max is {self.nf_max}; it must be at least nf, {self.nf}")
        if self.embed < 0:
            raise ValueError(f"embed is {self.embed}; it must not be negative (0 leaves the embedding out)")
        if self.small_h not in ("reference", "calibrated"):
            raise ValueError(f"small_h is {self.small_h!r}; expected reference or calibrated")
        check_side(self.family, self.size)

    @property
    def family(self) -> str:
        """GP-GAN family of the convolutional blocks: ``base`` for arch adafm, else ``arch``."""
        return self.base if self.arch == "adafm" else self.arch

    @property
    def classes(self) -> int:
        """Labels the pair is conditioned on; 0 for none."""
        return self.nlabels if self.nlabels > 1 else 0

    def to_json(self) -> dict:
        """All fields as a dictionary of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> ModelConfig:
        """Inverse of ``to_json``; fields left out take their default.

        Raises:
            ValueError: an unknown field, a required field that is absent, or an inadmissible value.
        """
        return from_json(cls, values)


def check_side(family: str, size: int) -> None:
    """Raise ValueError with the admissible sides unless ``family`` can make images of ``size`` pixels."""
    if family == "resnet":
        if size < 8 or size & (size - 1):
            raise ValueError(f"size is {size}; family resnet makes powers of two from 8: 8, 16, 32, 64, ...")
        return
    factor = SIDE_FACTORS[family]
    if size % factor:
        sides = ", ".join(str(factor * k) for k in (1, 2, 3, 4))
        raise ValueError(f"size is {size}; family {family} makes sides that are multiples of {factor}: {sides}, ...")
