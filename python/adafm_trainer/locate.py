"""What --data and --source may name: a path, or something that comes with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from .data.bundled import NAMES, bundled
from .errors import DataError, SourceError

TARGET = "open-peeps"


def image_path(text: str) -> Path:
    """A path as it is, or the bundled image set of that name.

    Raises:
        DataError: neither exists.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text in NAMES:
        return bundled(text)
    raise DataError(f"no images at {text!r}: it is neither a path nor one of the bundled sets {', '.join(NAMES)}")


def source_path(text: str) -> Path:
    """A path as it is, or for ``bundled`` the source network that comes with the package.

    Raises:
        SourceError: it does not exist.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text == "bundled":
        shipped = Path(str(resources.files("adafm_trainer") / "assets" / "source"))
        if shipped.is_dir():
            return shipped
        raise SourceError("the bundled source network is missing from this installation: install the package again")
    raise SourceError(
        f"no source at {text!r}: give a folder written by `adafm pretrain` or `adafm convert`, or `bundled`"
    )
