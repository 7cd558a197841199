"""The process of one configuration of a training step, seen from the process that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from .case import CheckError

MODULE = "adafm_trainer.bench.step_child"
# Share of the memory that the processes may fill together, and how much more than ours the largest may need.
_FILL, _LARGER = 0.85, 1.25
# For a peak that depends on the step alone: the C library's allocator then gives every larger block back at once, while
# by default it keeps some, and which ones differs from process to process. It takes time, so nothing is timed with it.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Worker(Protocol):
    """A configuration in a process of its own; ``known`` is what it said first."""

    known: dict

    def ask(self, **command) -> dict: ...


class Child:
    """A started process; a context that ends it. CheckError where it ends by itself.

    ``environment``: variables that it has beside those of this process.
    """

    def __init__(
        self,
        case: str,
        way: str,
        device: str,
        quick: bool,
        threads: int,
        folder: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        print(f"{case:15} {way}: building and checking", file=sys.stderr, flush=True)
        self._name = f"{case}, {way}"
        command = [sys.executable, "-m", MODULE, "--case", case, "--way", way, "--device", device]
        command += ["--folder", str(folder), *["--quick"] * quick]
        counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **counts, "OMP_WAIT_POLICY": "PASSIVE", **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.known = self._read()
        except BaseException:
            self._process.kill()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def ask(self, **command) -> dict:
        """The answer to a command."""
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise CheckError(f"{self._name}: the process ended with code {self._process.wait()}; its error is above")
        return json.loads(line)


def together(known: dict, memory: int | None) -> int:
    """How many processes like the one that said ``known`` fit into memory; ``memory``: bytes, None: what is free."""
    room = memory or known["room_bytes"]
    need = max(known["peak_bytes"] or 0, known["resident_bytes"])
    return int(_FILL * room / (_LARGER * need)) if room and need else sys.maxsize
