"""`adafm doctor`: the report of `python -m adafm_kernels`."""

from __future__ import annotations

from adafm_kernels import doctor


def main(argv: list[str]) -> int:
    return doctor.main(argv)
