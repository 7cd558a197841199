"""`adafm demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..trainer.demo import STEPS, run_demo
from .flags import parse


@dataclass(frozen=True)
class DemoArgs:
    """Adapt the bundled source network to 100 bundled images of a style it has never seen."""

    outdir: Path | None = None
    """Folder for the run and its report, empty or absent; by default runs/demo, or runs/demo-2 and so on once taken."""
    steps: int = STEPS
    """Optimizer steps."""
    eval_samples: int = 500
    """Images drawn for the evaluation."""
    seed: int = 0
    """Seed of every random draw."""
    compare: bool = False
    """Also run the baselines (modulation held at identity, full fine-tuning, from scratch) here, at the same steps."""


def free_folder(wanted: Path) -> Path:
    """``wanted``, or with the first number behind it that is not taken."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def main(argv: list[str]) -> int:
    args = parse(DemoArgs, "adafm demo", argv)
    outdir = free_folder(Path("runs/demo")) if args.outdir is None else args.outdir
    run_demo(outdir, steps=args.steps, eval_samples=args.eval_samples, seed=args.seed, compare=args.compare)
    return 0
