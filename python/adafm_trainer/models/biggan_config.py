"""Sizes of a BigGAN pair and the widths of its blocks (Brock, Donahue and Simonyan, ICLR 2019, appendix B)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .description import from_json
from .spectral import SpectralNorm

BOTTOM = 4
"""Side of the generator's first map."""
LEAST_ATTENDED = 8
"""Fewest channels of a map that self-attention can follow: its queries and keys have an eighth of them."""
INITS = ("ortho", "N02")

# Widths in multiples of ch. The generator's map of the first width is followed by one block for each further width.
_GENERATOR = {32: (4, 4, 4, 4), 64: (16, 16, 8, 4, 2), 128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1)}
_DISCRIMINATOR = {32: (4, 4, 4, 4), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16), 256: (1, 2, 4, 8, 8, 16, 16)}
# Blocks at the discriminator's end that keep the side.
_KEEPING = {32: 2, 64: 1, 128: 1, 256: 1}
SIZES = tuple(_GENERATOR)


@dataclass(frozen=True)
class BlockPlan:
    """One block: channels in and out, whether it changes the side by 2, and the side that attention goes by.

    That side is the one of the block's output, but at 32 pixels the published description gives every block of the
    discriminator 16, also the one that makes maps of 8: attention at 16 then follows all four.
    """

    fin: int
    fout: int
    resample: bool
    side: int


@dataclass(frozen=True)
class BigGANConfig:
    """Description of a BigGAN generator and discriminator, for ``models.architecture``.

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    size: int
    """Image side: 32, 64, 128 or 256."""
    arch: str = "biggan"
    channels: int = 3
    """Image channels: 1 or 3."""
    ch: int = 96
    """Base width of the generator."""
    d_ch: int | None = None
    """Base width of the discriminator; None is ``ch``."""
    z_dim: int = 120
    """Length of the latent; with ``hier`` a multiple of its chunks, one for the first map and one for each block."""
    classes: int = 1000
    """Classes: rows of the embeddings."""
    shared_dim: int = 128
    """Length of the class embedding that all norms share; 0: every norm has tables of its own for the classes."""
    hier: bool = True
    """Hierarchical latent: each block's norms are conditioned on [class embedding, its chunk of z]."""
    g_attention: tuple[int, ...] | None = None
    """Sides of the generator's maps that self-attention follows; None is 64 from 128 pixels on, and none below."""
    d_attention: tuple[int, ...] | None = None
    """The same of the discriminator."""
    sn_values: int = 1
    """Singular values that are followed (the first one divides)."""
    sn_iterations: int = 1
    """Power iterations each forward in train mode."""
    sn_eps: float = 1e-6
    bn_eps: float = 1e-5
    init: str = "ortho"
    """Initial filters and tables: ortho (orthogonal) or N02 (normal, standard deviation 0.02)."""

    def __post_init__(self) -> None:
        if self.arch != "biggan":
            raise ValueError(f"arch is {self.arch!r}; this description is of arch 'biggan'")
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size}; arch biggan makes {', '.join(map(str, SIZES))}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; expected 1 or 3")
        for name in ("ch", "z_dim", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_ch is not None and self.d_ch < 1:
            raise ValueError(f"d_ch is {self.d_ch}; it must be at least 1, or None for ch")
        if self.shared_dim < 0:
            raise ValueError(f"shared_dim is {self.shared_dim}; it must not be negative (0 leaves the embedding out)")
        if not self.bn_eps > 0:
            raise ValueError(f"bn_eps is {self.bn_eps}; it must be positive")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}; expected one of {', '.join(INITS)}")
        self._check_latent()
        for name in ("g_attention", "d_attention"):
            sides = getattr(self, name)
            default = (64,) if self.size >= 128 else ()
            object.__setattr__(self, name, default if sides is None else tuple(sides))
        self._check_attention("g_attention", self.generator_blocks())
        self._check_attention("d_attention", self.discriminator_blocks())
        SpectralNorm(self.sn_values, self.sn_iterations, self.sn_eps)

    @property
    def norm(self) -> SpectralNorm:
        """Settings of the spectral norm."""
        return SpectralNorm(self.sn_values, self.sn_iterations, self.sn_eps)

    @property
    def chunk(self) -> int:
        """Length of the part of z that enters the first linear layer, and with ``hier`` of every further part."""
        return self.z_dim // self._chunks if self.hier else self.z_dim

    @property
    def condition_dim(self) -> int:
        """Length of what conditions a block's norms: embedding and chunk of z; 0 without a shared embedding."""
        return self.shared_dim + (self.chunk if self.hier else 0)

    @property
    def first_width(self) -> int:
        """Channels of the generator's first map."""
        return _GENERATOR[self.size][0] * self.ch

    def generator_blocks(self) -> list[BlockPlan]:
        """Blocks from the latent's end to the image's; each doubles the side."""
        widths = [width * self.ch for width in _GENERATOR[self.size]]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        return [BlockPlan(fin, fout, True, BOTTOM << (i + 1)) for i, (fin, fout) in enumerate(pairs)]

    def discriminator_blocks(self) -> list[BlockPlan]:
        """Blocks from the image's end to the logit's."""
        widths = [width * (self.d_ch or self.ch) for width in _DISCRIMINATOR[self.size]]
        halving = len(widths) - _KEEPING[self.size]
        pairs = zip([self.channels, *widths[:-1]], widths, strict=True)
        return [
            BlockPlan(fin, fout, i < halving, 16 if self.size == 32 else self.size >> min(i + 1, halving))
            for i, (fin, fout) in enumerate(pairs)
        ]

    def to_json(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BigGANConfig:
        """Inverse of ``to_json``; fields left out take their default.

        Raises:
            ValueError: an unknown field, no ``size``, or an inadmissible value.
        """
        return from_json(cls, values)

    @property
    def _chunks(self) -> int:
        return len(_GENERATOR[self.size])

    def _check_latent(self) -> None:
        if not self.hier:
            return
        if not self.shared_dim:
            raise ValueError("hier is true and shared_dim 0; a hierarchical latent needs the shared class embedding")
        if self.z_dim % self._chunks:
            below = self.z_dim // self._chunks * self._chunks
            near = [str(n) for n in (below, below + self._chunks) if n]
            raise ValueError(
                f"z_dim is {self.z_dim}; at {self.size} pixels a hierarchical latent is {self._chunks} chunks of one "
                f"length: take {' or '.join(near)}"
            )

    def _check_attention(self, name: str, blocks: list[BlockPlan]) -> None:
        sides = {block.side for block in blocks}
        for side in getattr(self, name):
            if side not in sides:
                listed = ", ".join(map(str, sorted(sides)))
                raise ValueError(f"{name} has {side}; at {self.size} pixels the maps have sides {listed}")
            narrow = [block.fout for block in blocks if block.side == side and block.fout < LEAST_ATTENDED]
            if narrow:
                raise ValueError(
                    f"{name} has {side}, where maps have {narrow[0]} channels; "
                    f"attention needs at least {LEAST_ATTENDED}"
                )
