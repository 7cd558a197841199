"""`adafm sample RUN`: a grid of samples, one for each seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..data.grid import save_grid
from ..errors import UsageError
from ..trainer.load import load_run
from ..trainer.sampling import generate
from .flags import parse


@dataclass(frozen=True)
class SampleArgs:
    """Draw images from a run's averaged generator; image k of a run is always the same picture."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    seeds: str = "0-63"
    """Samples to draw: numbers and ranges, as in 0-35,80."""
    out: Path = Path("samples.png")
    """PNG to write."""
    columns: int | None = None
    """Images in a row; as square as possible by default."""
    scale: int = 1
    """Every pixel becomes a square of this side."""
    device: str = "auto"
    """Device to draw on."""


def main(argv: list[str]) -> int:
    args = parse(SampleArgs, "adafm sample", argv)
    loaded = load_run(args.run, args.device)
    images = generate(loaded.generator, 0, "sample", parse_seeds(args.seeds), autocast=loaded.autocast)
    save_grid(args.out, images / loaded.config.data_scale, columns=args.columns, scale=args.scale)
    print(f"{len(images)} samples of step {loaded.step}: {args.out}")
    return 0


def parse_seeds(text: str) -> list[int]:
    """``"0-3,8"`` -> ``[0, 1, 2, 3, 8]``.

    Raises:
        UsageError: not of that form, or a range that runs backwards.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or part.strip().endswith("-"):
            raise UsageError(f"--seeds {text!r}: {part.strip()!r} is neither a number nor a range such as 0-63")
        start, stop = int(first), int(last or first)
        if stop < start:
            raise UsageError(f"--seeds {text!r}: the range {part.strip()!r} runs backwards")
        seeds += range(start, stop + 1)
    return seeds
