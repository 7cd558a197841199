"""Stages, widths and names of the four GP-GAN families (Mescheder, Geiger and Nowozin, ICML 2018), as data."""

from __future__ import annotations

from dataclasses import dataclass

from .config import SIDE_FACTORS, ModelConfig


@dataclass(frozen=True)
class Block:
    """One residual block: module name, input and output channels."""

    name: str
    fin: int
    fout: int


@dataclass(frozen=True)
class Plan:
    """One network. Stages run in order; maps are resampled by 2 between stages.

    ``side`` and ``width`` are those of the map next to the linear layer. ``resample_first`` puts one more resampling
    before the first stage (discriminator of resnet3), ``resample_last`` one after the last (its generator).
    """

    side: int
    width: int
    stages: tuple[tuple[Block, ...], ...]
    image_kernel: int
    resample_first: bool = False
    resample_last: bool = False

    @property
    def image_width(self) -> int:
        """Channels of the map at the image's end of a generator."""
        return self.stages[-1][-1].fout


# Widths in units of nf between consecutive stages, from the first stage's input to the last stage's output.
_GENERATOR_WIDTHS = {
    "resnet2": (16, 16, 16, 8, 4, 2, 1),
    "resnet3": (32, 16, 16, 8, 4, 2, 1),
    "resnet4": (16, 16, 16, 8, 4, 2, 1, 1),
}
_DISCRIMINATOR_WIDTHS = {
    "resnet2": (1, 2, 4, 8, 16, 16, 16),
    "resnet3": (1, 2, 4, 8, 16, 16, 32),
    "resnet4": (1, 1, 2, 4, 8, 16, 16, 16),
}
_IMAGE_KERNELS = {"resnet": 3, "resnet2": 3, "resnet3": 7, "resnet4": 7}


def generator_plan(cfg: ModelConfig) -> Plan:
    """Stages of the GP-GAN generator of ``cfg.family``, latent side first."""
    family, nf = cfg.family, cfg.nf
    if family == "resnet":
        levels, most = _levels(cfg), cfg.nf_max or 512
        widths = [min(nf * 2**i, most) for i in range(levels, -1, -1)]
        pairs = [*zip(widths[:-1], widths[1:], strict=True), (nf, nf)]
        stages = tuple((Block(f"resnet.{2 * i}", *pair),) for i, pair in enumerate(pairs))
        return Plan(4, widths[0], stages, _IMAGE_KERNELS[family])
    widths = [nf * k for k in _GENERATOR_WIDTHS[family]]
    stages = []
    for t, (fin, fout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        first = Block(f"resnet_{t}_0", fin, fout)
        stages.append((first, Block(f"resnet_{t}_1", fout, fout)) if family == "resnet2" else (first,))
    side = cfg.size // SIDE_FACTORS[family]
    return Plan(side, widths[0], tuple(stages), _IMAGE_KERNELS[family], resample_last=family == "resnet3")


def discriminator_plan(cfg: ModelConfig) -> Plan:
    """Stages of the GP-GAN discriminator of ``cfg.family``, image side first."""
    family, nf = cfg.family, cfg.nf
    if family == "resnet":
        levels, most = _levels(cfg), cfg.nf_max or 1024
        widths = [min(nf * 2**i, most) for i in range(levels + 1)]
        pairs = [(nf, nf), *zip(widths[:-1], widths[1:], strict=True)]
        stages = tuple((Block(f"resnet.{2 * i}", *pair),) for i, pair in enumerate(pairs))
        return Plan(4, widths[-1], stages, _IMAGE_KERNELS[family])
    widths = [nf * k for k in _DISCRIMINATOR_WIDTHS[family]]
    stages = []
    for t, (fin, fout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        last = Block(f"resnet_{t}_{int(family == 'resnet2')}", fin, fout)
        stages.append((Block(f"resnet_{t}_0", fin, fin), last) if family == "resnet2" else (last,))
    side = cfg.size // SIDE_FACTORS[family]
    return Plan(side, widths[-1], tuple(stages), _IMAGE_KERNELS[family], resample_first=family == "resnet3")


def join_stage(plan: Plan, keep: int) -> int:
    """Index of the first stage that belongs to the ``keep`` image-side groups; group 1 is ``conv_img`` alone."""
    stages = len(plan.stages)
    if not 1 <= keep <= stages + 1:
        raise ValueError(f"keep is {keep}; this generator can keep 1 to {stages + 1} groups from the image side")
    return stages - keep + 1


def join_shape(plan: Plan, keep: int) -> tuple[int, int]:
    """Channels and side of the map that enters the ``keep`` image-side groups of a generator."""
    first = join_stage(plan, keep)
    width = plan.stages[first][0].fin if first < len(plan.stages) else plan.image_width
    return width, plan.side * 2 ** max(first - 1, 0)


def _levels(cfg: ModelConfig) -> int:
    return cfg.size.bit_length() - 3
