"""Parsing of one command's flags into a frozen dataclass."""

from __future__ import annotations

from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], prog: str, argv: list[str], default: T | None = None) -> T:
    """Flags of ``argv`` as a ``kind``; a mistake prints what is wrong with the nearest flag and exits with code 2."""
    if default is None:
        return tyro.cli(kind, prog=prog, args=argv)
    return tyro.cli(kind, prog=prog, args=argv, default=default)
