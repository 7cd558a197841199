"""The `adafm` command."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ..errors import AdafmError

_COMMANDS = {
    "demo": ("adapt the bundled source to the bundled 100 images and show the result", "demo"),
    "doctor": ("versions, devices and which backend serves each op; --verify checks the kernels here", "doctor"),
    "convert": ("read a published checkpoint into a source folder", "convert"),
    "distance": ("how far two image sets are apart, to choose a source", "distance"),
    "pretrain": ("train a source network from random weights", "pretrain"),
    "train": ("adapt a source: train METHOD ..., or continue a run: train --resume RUN", "train"),
    "eval": ("judge a run's generator against held-out images", "evaluate"),
    "bank": ("tasks of a GAN memory: their sizes, and a row of samples of each", "bank"),
    "sample": ("grid of a run's samples by seed", "sample"),
    "interpolate": ("strip of samples between seeds", "interpolate"),
    "report": ("write a run's report.html again", "report"),
    "bench": ("measure on this machine", "bench"),
}
# What torchrun may start in several processes.
_DISTRIBUTED = ("train", "pretrain")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors a user can mend are one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        from adafm_kernels import __version__

        print(__version__)
        return 0
    if command not in _COMMANDS:
        print(f"adafm: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    if command not in _DISTRIBUTED and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        print(
            f"adafm {command}: works in one process; torchrun starts `adafm {'` or `adafm '.join(_DISTRIBUTED)}`",
            file=sys.stderr,
        )
        return 2
    module = import_module(f".{_COMMANDS[command][1]}", __name__)
    try:
        return module.main(rest)
    except AdafmError as error:
        print(f"adafm {command}: {error}", file=sys.stderr)
        return error.exit_code


def _usage() -> str:
    rows = "\n".join(f"  {name:12} {text}" for name, (text, _) in _COMMANDS.items())
    return f"usage: adafm COMMAND [flags]\n\n{rows}\n\nadafm COMMAND --help lists the flags of a command."
