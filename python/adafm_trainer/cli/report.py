"""`adafm report RUN`: write a run's report.html again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UsageError
from ..report.report import write_report
from .flags import parse


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html from what lies in a run directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""


def main(argv: list[str]) -> int:
    args = parse(ReportArgs, "adafm report", argv)
    if not (args.run / "config.yaml").is_file():
        raise UsageError(f"{args.run} holds no run: there is no config.yaml in it")
    print(write_report(args.run))
    return 0
