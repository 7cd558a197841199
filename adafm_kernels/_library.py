"""The native parts on disk: where they are, loading them, what they say about themselves.

``lib/libadafm.so`` holds the compiled kernels as ``torch.ops.adafm_compiled``; ``_C`` holds the host side. Neither is
touched by importing the package: the first op that needs the library loads it.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

LIBRARY_PATH = Path(__file__).parent / "lib" / "libadafm.so"
BUILD_COMMAND = "pip install --no-build-isolation -e ."


class LibraryMissingError(RuntimeError):
    """The compiled library is absent or does not load; the message says what to type."""


@functools.cache
def load_library() -> None:
    """Load ``libadafm.so`` once, which defines ``torch.ops.adafm_compiled``; LibraryMissingError where it cannot."""
    if not LIBRARY_PATH.is_file():
        raise LibraryMissingError(
            f"the compiled kernels are missing: there is no {LIBRARY_PATH.name} in {LIBRARY_PATH.parent}. "
            f'Build them in the project folder with `{BUILD_COMMAND}`, or ask for backend="reference"'
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        raise LibraryMissingError(
            f"the compiled kernels do not load with torch {torch.__version__}: {error}. "
            f'Rebuild them in the project folder with `{BUILD_COMMAND}`, or ask for backend="reference"'
        ) from error


def build_info() -> tuple[dict[str, Any] | None, str]:
    """What ``_C.build_info()`` says about the build, and "" ; or None and the reason why there is nothing to say."""
    try:
        host = importlib.import_module("adafm_kernels._C")
    except ImportError as error:
        return None, f"adafm_kernels._C is missing ({error}); build it with `{BUILD_COMMAND}`"
    return host.build_info(), ""


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """The compute capabilities compiled into the library ("80", "90a"), none where it has no CUDA kernels."""
    info, _ = build_info()
    return tuple(info["cuda_archs"]) if info is not None and info["cuda"] else ()


def serves_capability(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether machine code for one of the architectures runs on a device of this compute capability.

    "80" runs on every 8.x from 8.0 up; "90a" on 9.0 alone.
    """
    for name in architectures:
        exact = not name.isdigit()
        number = name.rstrip("abcdefghijklmnopqrstuvwxyz")
        major, minor = int(number[:-1]), int(number[-1])
        if major == capability[0] and (minor == capability[1] or (minor < capability[1] and not exact)):
            return True
    return False
