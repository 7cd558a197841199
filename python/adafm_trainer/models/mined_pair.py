"""Family "mined": a miner in front of one source generator, or of several, and the first source's discriminator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import SourceError
from .architecture import Architecture, Description, Groups, State
from .biggan import BigGANGenerator
from .description import from_json
from .groups import check_groups
from .mined import MinedGenerator
from .miners import miner_for
from .multi_mine import MultiMinedGenerator, SelectingMiner
from .source_families import described, find


@dataclass(frozen=True)
class MinedConfig:
    """Sizes of a mined pair.

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    sources: tuple[dict[str, Any], ...]
    """Descriptions of the source pairs; images of one shape. The discriminator is that of the first."""
    arch: str = "mined"
    u_dim: int | None = None
    """Length of the miner's input; None is that of the (first) source's latent."""
    hidden: int | None = None
    """Width of an MLP miner; None is the length of the source's latent."""
    init: str = "identity"
    """Start values of the miner: identity, orthogonal, reference or glorot."""
    freeze_buffers: bool = True
    """While the generators are frozen their running statistics and spectral vectors stay too."""
    reduce: str = "sample_max"
    """Several sources: the winner is chosen for each sample (sample_max) or for the batch (batch_max)."""
    selector: str = "p"
    """Several sources: sampling draws a source from the estimate p, or a head on the miner names it (head)."""
    rho: float = 0.05
    """Several sources: step of the estimate p."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(dict(source) for source in self.sources))
        if self.arch != "mined":
            raise ValueError(f"arch is {self.arch!r}; a mined pair has arch mined")
        if not self.sources:
            raise ValueError("sources is empty; a mined pair has at least one source")
        first, *others = self.described
        for k, other in enumerate(others, 2):
            if (other.size, other.channels) != (first.size, first.channels):
                raise ValueError(
                    f"source {k} makes images of {other.size} pixels and {other.channels} channels, source 1 of "
                    f"{first.size} and {first.channels}; sources that are mined together must agree in both"
                )

    @property
    def described(self) -> tuple[Description, ...]:
        """The sources' descriptions."""
        return tuple(described(source) for source in self.sources)

    @property
    def size(self) -> int:
        return self.described[0].size

    @property
    def channels(self) -> int:
        return self.described[0].channels

    @property
    def z_dim(self) -> int:
        """Length of the latent: the miner's input, and with several sources one entry more that chooses among them."""
        return (self.u_dim or self.described[0].z_dim) + (len(self.sources) > 1)

    @property
    def classes(self) -> int:
        """Classes that are left to label: those of a single source whose miner makes no class embedding."""
        if len(self.sources) > 1 or _mines_embedding(self.described[0]):
            return 0
        return self.described[0].classes

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sources": list(self.sources)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MinedConfig:
        return from_json(cls, values)


def build_generator(cfg: MinedConfig) -> MinedGenerator | MultiMinedGenerator:
    """The mined generator of ``cfg``; the sources have random weights, so a BigGAN's miner has a random mean class.

    Raises:
        SourceError: sources that cannot be mined together.
    """
    generators = [find(source.arch).generator(source) for source in cfg.described]
    if len(generators) == 1:
        miner = miner_for(generators[0], cfg.init, cfg.u_dim, cfg.hidden)
        return MinedGenerator(miner, generators[0], cfg.freeze_buffers)
    u_dim = cfg.z_dim - 1
    if cfg.selector == "head":
        lengths = sorted({source.z_dim for source in cfg.described})
        if len(lengths) > 1:
            raise SourceError(
                f"--selector head: one miner serves all sources, and their latents have lengths {lengths}; use "
                "--selector p, which gives each source a miner"
            )
        miners: Any = SelectingMiner(u_dim, lengths[0], len(generators), cfg.hidden)
    else:
        miners = [_miner(generator, cfg, u_dim) for generator in generators]
    return MultiMinedGenerator(
        generators, miners, u_dim, cfg.reduce, cfg.selector, cfg.rho, freeze_buffers=cfg.freeze_buffers
    )


def build_discriminator(cfg: MinedConfig) -> nn.Module:
    """The discriminator of the first source."""
    source = cfg.described[0]
    return find(source.arch).discriminator(source)


def groups(module: nn.Module, cfg: MinedConfig) -> Groups:
    """The first source's groups for the discriminator and for a single generator, each with the miner as the last;
    several generators are one group each."""
    source = cfg.described[0]
    of_source = find(source.arch).groups
    if isinstance(module, MinedGenerator):
        listed = of_source(module.generator, source)
        found = [(name, [f"generator.{part}" for part in parts]) for name, parts in listed]
        found.append(("miner", ["miner"]))
    elif isinstance(module, MultiMinedGenerator):
        found = [(f"source {k + 1}", [f"generators.{k}"]) for k in range(len(module.generators))]
        found.append(("miners", ["miners"]))
    else:
        return of_source(module, source)
    check_groups(module, found)
    return found


def modulated(module: nn.Module, names: list[str]) -> list[str]:
    raise SourceError("a mined pair is modulated through its sources, not as a whole; use --stage2 adafm")


def infer(arch: str, networks: Mapping[str, State]) -> MinedConfig:
    raise SourceError("a mined pair is not converted: convert its sources, and mine them with `adafm train minegan`")


def rename(network: str, state: State) -> State:
    return state


def _miner(generator: nn.Module, cfg: MinedConfig, u_dim: int) -> nn.Module:
    if isinstance(generator, BigGANGenerator) and generator.cfg.shared_dim:
        if u_dim != generator.z_dim:
            raise SourceError(
                f"the miner of a BigGAN takes u of its latent's length, {generator.z_dim}, and the other sources have "
                f"{u_dim}; mine sources of one latent length together"
            )
        return miner_for(generator, cfg.init)
    return miner_for(generator, cfg.init, u_dim, cfg.hidden)


def _mines_embedding(source: Description) -> bool:
    return source.arch == "biggan" and bool(getattr(source, "shared_dim", 0))


ARCHITECTURE = Architecture(
    names=("mined",),
    describe=MinedConfig.from_json,
    generator=build_generator,
    discriminator=build_discriminator,
    groups=groups,
    modulated=modulated,
    infer=infer,
    rename=rename,
    label_free=True,
)
