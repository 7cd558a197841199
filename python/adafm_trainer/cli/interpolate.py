"""`adafm interpolate RUN`: samples between seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from ..data.grid import save_grid
from ..errors import UsageError
from ..trainer.load import load_run
from ..trainer.sampling import draw_labels, draw_latents, draw_noise
from .flags import parse
from .sample import parse_seeds


@dataclass(frozen=True)
class InterpolateArgs:
    """Draw a row of images between each pair of consecutive seeds, on the great circle between their latents."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    seeds: str = "0-4"
    """At least two samples to pass through: numbers and ranges, as in 0-4,9."""
    frames: int = 8
    """Images in a row, both ends included."""
    out: Path = Path("interpolation.png")
    """PNG to write: one row for each pair."""
    label: int | None = None
    """Class of every image, for a run with labels; by default a row has that of its first seed."""
    scale: int = 1
    """Every pixel becomes a square of this side."""
    device: str = "auto"
    """Device to draw on."""


def main(argv: list[str]) -> int:
    args = parse(InterpolateArgs, "adafm interpolate", argv)
    seeds = parse_seeds(args.seeds)
    if len(seeds) < 2 or args.frames < 2:
        raise UsageError(f"--seeds {args.seeds} --frames {args.frames}: at least two seeds and two frames are needed")
    loaded = load_run(args.run, args.device)
    generator = loaded.generator
    device = next(generator.parameters()).device
    y = _labels(args, generator, seeds)
    z = draw_latents(generator, 0, "sample", 0, seeds)
    path = torch.cat([slerp(a, b, args.frames) for a, b in zip(z[:-1], z[1:], strict=True)]).to(device)
    noise = draw_noise(generator, 0, "sample", 0, [seeds[0]] * len(path))
    if noise is not None:
        noise = tuple(n.to(device) for n in noise)
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=loaded.autocast or torch.bfloat16, enabled=loaded.autocast is not None),
    ):
        images = generator(path, None if y is None else y.to(device), noise).float().cpu()
    save_grid(args.out, images / loaded.config.data_scale, columns=args.frames, scale=args.scale)
    print(f"{len(seeds) - 1} rows of {args.frames}: {args.out}")
    return 0


def _labels(args: InterpolateArgs, generator: nn.Module, seeds: list[int]) -> Tensor | None:
    """A label for every image, or None for a generator that is given none."""
    classes = generator.sample_classes
    if args.label is not None and not 0 <= args.label < classes:
        known = f"has the classes 0 to {classes - 1}" if classes else "was trained without labels: leave it out"
        raise UsageError(f"--label {args.label}: the run {known}")
    y = draw_labels(generator, seeds[:-1] if args.label is None else [args.label] * (len(seeds) - 1))
    return None if y is None else y.repeat_interleave(args.frames)


def slerp(a: Tensor, b: Tensor, frames: int) -> Tensor:
    """Spherical interpolation ``[frames, z_dim]`` from ``a`` to ``b`` (Shoemake, 1985); norms are interpolated too."""
    unit_a, unit_b = a / a.norm(), b / b.norm()
    angle = torch.arccos((unit_a * unit_b).sum().clamp(-1, 1)).item()
    t = torch.linspace(0, 1, frames)[:, None]
    if math.sin(angle) < 1e-6:
        return a + t * (b - a)
    direction = (torch.sin((1 - t) * angle) * unit_a + torch.sin(t * angle) * unit_b) / math.sin(angle)
    return direction * ((1 - t) * a.norm() + t * b.norm())
