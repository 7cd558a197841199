"""The op's backends a golden case runs on; one that is not there skips the case with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from adafm_kernels.backends import BACKENDS, use_backend, which_backend

__all__ = ["BACKENDS", "on_backend"]


@contextlib.contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Force the backend ``name`` for CPU tensors; ``any`` leaves the choice open.

    Triton runs here under its interpreter only, which TRITON_INTERPRET=1 switches on before Python starts.
    """
    if name == "any":
        yield
        return
    try:
        which_backend(device="cpu", backend=name)
    except RuntimeError as error:
        pytest.skip(f"{name}: {error}")
    with use_backend(name):
        yield
