"""`adafm pretrain`: a source network from random weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import tyro

from ..errors import UsageError
from ..methods.config import TrainConfig
from ..methods.presets import preset
from ..models.architecture import Description
from ..models.catalogue import describe
from ..models.config import GPGAN_FAMILIES
from ..trainer.start import start_run
from .flags import parse

# A source has more to learn than one target: `adafm train scratch` takes fewer.
STEPS = 8400


@dataclass(frozen=True)
class PretrainArgs(TrainConfig):
    """Train a pair from random weights. The run directory's `source` folder can then be given as --source."""

    arch: Literal["resnet", "resnet2", "resnet3", "resnet4", "wgan-resnet", "biggan", "dcgan", "mnist"] = "resnet"
    """Network family: GP-GAN's (Mescheder, Geiger and Nowozin, ICML 2018), TransferGAN's, BigGAN, DCGAN, or MineGAN's
    for digits. --classes makes it conditional where the family can be."""
    size: int = 64
    """Image side in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    nf: int = 32
    """Base width: channels of the feature maps at full resolution."""
    nf_max: int | None = 256
    """Most channels of any feature map (family `resnet`; the others ignore it)."""
    z_dim: int = 128
    """Latent size."""
    statistics: Literal["batch", "running"] = "batch"
    """`wgan-resnet` only: statistics of the generator's normalisation when it draws: the batch's, as published, so that
    a picture depends on its batch, or running ones."""


def main(argv: list[str]) -> int:
    archs = [argv[k + 1] for k, a in enumerate(argv[:-1]) if a == "--arch"]
    archs += [a.partition("=")[2] for a in argv if a.startswith("--arch=")]
    own = preset("scratch", "--faithful" in argv, *archs[:1])
    values = {"steps": STEPS, **own} if "--faithful" in argv else {**own, "steps": STEPS}
    default = PretrainArgs(data=tyro.MISSING, outdir=tyro.MISSING, **values)
    args = parse(PretrainArgs, "adafm pretrain", argv, default)
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(args, name) for name in fields})
    start_run("scratch", config, _model(args))
    return 0


def _model(args: PretrainArgs) -> Description:
    """The description of the family's pair, with what the family has no flag for at its default."""
    common = {"arch": args.arch, "size": args.size, "channels": args.channels, "z_dim": args.z_dim}
    if args.arch in GPGAN_FAMILIES:
        labels = {"embed": args.z_dim, "nlabels": args.classes} if args.classes else {"embed": 0, "nlabels": 1}
        own = {"nf": args.nf, "nf_max": args.nf_max, **labels}
    elif args.arch == "biggan":
        own = {"ch": args.nf, "classes": args.classes or 1}
    elif args.arch == "dcgan":
        own = {"ngf": args.nf, "ndf": args.nf, "classes": args.classes}
    else:
        own = {"dim": args.nf, "classes": args.classes}
    if args.arch == "wgan-resnet":
        own["statistics"] = args.statistics
    try:
        return describe({**common, **own})
    except ValueError as error:
        raise UsageError(f"--arch {args.arch}: {error}") from error
