"""`adafm demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..trainer.demo import STEPS, run_demo
from .flags import parse


@dataclass(frozen=True)
class DemoArgs:
    """Adapt the bundled source network to 100 bundled images of a style it has never seen."""

    outdir: Path = Path("runs/demo")
    """Folder for the run and its report; it must be empty or absent."""
    steps: int = STEPS
    """Optimizer steps."""
    eval_samples: int = 500
    """Images drawn for the evaluation."""
    seed: int = 0
    """Seed of every random draw."""
    compare: bool = False
    """Also run the baselines (modulation held at identity, full fine-tuning, from scratch) here, at the same steps."""


def main(argv: list[str]) -> int:
    args = parse(DemoArgs, "adafm demo", argv)
    run_demo(args.outdir, steps=args.steps, eval_samples=args.eval_samples, seed=args.seed, compare=args.compare)
    return 0
