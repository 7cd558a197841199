"""`adafm pretrain`: a source network from random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import tyro

from ..methods.config import TrainConfig
from ..methods.presets import preset
from ..models.config import ModelConfig
from ..trainer.start import start_run
from .flags import parse


@dataclass(frozen=True)
class PretrainArgs(TrainConfig):
    """Train a GP-GAN pair from random weights. The run directory's `source` folder can then be given as --source."""

    arch: Literal["resnet", "resnet2", "resnet3", "resnet4"] = "resnet"
    """Network family of Mescheder, Geiger and Nowozin (ICML 2018)."""
    size: int = 64
    """Image side in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    nf: int = 32
    """Channels of the widest feature map."""
    nf_max: int | None = 256
    """Most channels of any feature map (family `resnet`; the others ignore it)."""
    z_dim: int = 128
    """Latent size."""


def main(argv: list[str]) -> int:
    default = PretrainArgs(data=tyro.MISSING, outdir=tyro.MISSING, steps=8400, **preset("scratch"))
    args = parse(PretrainArgs, "adafm pretrain", argv, default)
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(args, name) for name in fields})
    model = ModelConfig(
        arch=args.arch,
        size=args.size,
        channels=args.channels,
        nf=args.nf,
        nf_max=args.nf_max,
        z_dim=args.z_dim,
        embed=0,
        nlabels=1,
    )
    start_run("scratch", config, model)
    return 0
