"""`adafm bench`: measurements on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..bench import op
from ..bench.step import measure_steps, table
from ..trainer.demo import BATCH
from .flags import parse


@dataclass(frozen=True)
class BenchArgs:
    """Time the demo's training steps in bf16 channels-last against float32 contiguous, alternating in one process.

    `adafm bench op` times the ops; its flags: `adafm bench op --help`.
    """

    what: Annotated[Literal["step"], tyro.conf.Positional]
    """What to measure."""
    rounds: int = 15
    """Paired rounds."""
    batch: int = BATCH
    """Images a step."""
    json: Path | None = None
    """File for every number with the machine, versions and commit."""


def main(argv: list[str]) -> int:
    if argv[:1] == ["op"]:
        return op.main(argv[1:])
    args = parse(BenchArgs, "adafm bench", argv)
    result = measure_steps(rounds=args.rounds, batch=args.batch)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0
