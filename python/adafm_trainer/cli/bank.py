"""`adafm bank FOLDER`: the tasks of a GAN memory, their sizes, and a row of samples of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.grid import save_grid
from ..trainer.bank import draw_tasks, open_bank, size_table, task_sizes
from .flags import parse


@dataclass(frozen=True)
class BankArgs:
    """List the tasks of a bank with the bytes each takes, and draw samples of them."""

    bank: Annotated[Path, tyro.conf.Positional]
    """Folder of the bank: --bank of the runs that made it, or OUTDIR/bank where several tasks were trained at once."""
    source: str
    """The source of the tasks: --source of those runs."""
    source_weights: Literal["average", "raw"] = "average"
    """--source-weights of those runs."""
    out: Path | None = None
    """PNG to write, with a row of samples for each task; column k has the same latents in every row."""
    tasks: str | None = None
    """Tasks to draw, as in flowers,cats; all by default."""
    columns: int = 8
    """Samples of each task."""
    seed: int = 0
    """Draws other samples."""
    single: bool = False
    """Draw each task with its own generator, instead of all in one mixed batch; the pictures agree to rounding."""
    scale: int = 1
    """Every pixel becomes a square of this side."""


def main(argv: list[str]) -> int:
    args = parse(BankArgs, "adafm bank", argv)
    opened = open_bank(args.bank, args.source, args.source_weights)
    bank = opened.bank
    print(f"{args.bank}: {bank.storage} storage")
    print(size_table(task_sizes(opened)))
    if args.out is None:
        return 0
    names = bank.names if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    images = draw_tasks(bank, names, args.columns, args.seed, single=args.single)
    save_grid(args.out, images / opened.data_scale, columns=args.columns, scale=args.scale)
    print(f"{args.columns} samples of each of {', '.join(names)}: {args.out}")
    return 0
