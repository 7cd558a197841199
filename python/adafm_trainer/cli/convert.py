"""`adafm convert FILE --arch ... OUT`: a published checkpoint as a source folder."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from ..errors import SourceError
from ..models.catalogue import architecture, build_discriminator, build_generator
from ..models.checkpoints import Checkpoint, LoadReport, infer_config, load_matching, read_checkpoint
from ..models.source import save_pair
from .flags import parse

# What a network is for its family's renaming, and how the names of a critic's TensorFlow variables begin.
_ROLES = {"generator_test": "average"}
_TF_CRITICS = ("Discriminator.", "teacher_Discriminator.")


@dataclass(frozen=True)
class ConvertArgs:
    """Read a checkpoint of published code (GP-GAN, AdaFM, BigGAN, TransferGAN, MineGAN, DCGAN) and write a folder that
    --source takes.

    A pickle's tensors are read and its code, if any, is refused. Sizes are told from the tensors' shapes.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """Checkpoint: .pt, .tar, .safetensors, or .npz of TensorFlow variables; with some of generator, discriminator and
    generator_test (the average), or one network's tensors alone, which are taken for the generator's."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    arch: Literal["resnet", "resnet2", "resnet3", "resnet4", "adafm", "biggan", "wgan-resnet", "dcgan", "mnist"]
    """Network family. GP-GAN: resnet2 for imagenet-*.pt, resnet4 for celeba-*, resnet3 for lsun_*, resnet for
    celebahq-*; wgan-resnet is that of TransferGAN, mnist that of MineGAN's digits."""
    discriminator: Path | None = None
    """File of the discriminator, where it is stored apart."""
    average: Path | None = None
    """File of the generator's weight average, where it is stored apart."""
    base: Literal["resnet", "resnet2", "resnet3", "resnet4"] = "resnet2"
    """Family of the kept blocks and of the discriminator, for --arch adafm."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type the weights are stored in."""
    allow_mismatch: bool = False
    """Write the folder although names or shapes differ; what is missing then starts at random."""


def main(argv: list[str]) -> int:
    return run(parse(ConvertArgs, "adafm convert", argv))


def run(args: ConvertArgs) -> int:
    """Convert, print what was loaded, missing, unexpected and mismatched; 0, or 4 if that is not everything.

    Raises:
        SourceError: the file cannot be read safely, its sizes cannot be told, or a weight is not finite when stored.
    """
    checkpoint = read_checkpoint(args.file)
    networks = _networks(args, checkpoint)
    if "generator" not in networks and "generator_test" in networks:
        print("no generator in the file; its average, generator_test, is taken for it")
        networks["generator"] = networks["generator_test"]
    family = architecture(args.arch)
    cfg = infer_config(args.arch, networks, args.base) if args.arch == "adafm" else family.infer(args.arch, networks)
    networks = {name: family.rename(_ROLES.get(name, name), state) for name, state in networks.items()}
    sizes = [f"{name} {value}" for name, value in cfg.to_json().items() if value is not None]
    print(f"{args.file.name}: {', '.join(sizes)}")
    for name, what in checkpoint.ignored.items():
        print(f"ignored: {name} ({what})")

    torch.manual_seed(0)
    builders = {"generator": build_generator, "discriminator": build_discriminator, "generator_test": build_generator}
    modules, reports = {}, {}
    for name, build in builders.items():
        if name not in networks:
            print(f"{name}: not in the file")
            continue
        modules[name] = build(cfg)
        reports[name] = load_matching(modules[name], networks[name])
        print("\n".join(reports[name].lines(name)))
    if not all(report.exact for report in reports.values()) and not args.allow_mismatch:
        message = "the checkpoint does not fit; nothing was written. Check --arch, or add --allow-mismatch"
        print(f"adafm convert: {message}", file=sys.stderr)
        return SourceError.exit_code

    try:
        save_pair(
            args.out,
            cfg,
            modules["generator"],
            modules.get("discriminator"),
            modules.get("generator_test"),
            meta=_provenance(args, reports),
            dtype=getattr(torch, args.dtype),
        )
    except ValueError as error:
        raise SourceError(f"{args.file}: {error}") from error
    print(f"wrote {args.out}")
    return 0


def _networks(args: ConvertArgs, checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The checkpoint's networks, and those of the other files; variables of TensorFlow stand for both networks."""
    networks = dict(checkpoint.networks)
    for name, path in (("discriminator", args.discriminator), ("generator_test", args.average)):
        if path is not None:
            apart = read_checkpoint(path).networks
            # A file of one network alone counts as a generator's, whichever it is.
            networks[name] = apart.get(name, apart.get("generator", {}))
    both = networks.get("generator", {})
    if "discriminator" not in networks and any(name.startswith(_TF_CRITICS) for name in both):
        networks["discriminator"] = both
    return networks


def _provenance(args: ConvertArgs, reports: dict[str, LoadReport]) -> dict:
    digest = hashlib.sha256()
    with args.file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    differing = {
        name: [*report.missing, *report.unexpected, *(entry[0] for entry in report.mismatched)]
        for name, report in reports.items()
        if not report.exact
    }
    return {"converted_from": args.file.name, "sha256": digest.hexdigest(), "not_loaded": differing}
