"""The run directory: its files, its lock, and what was written to it before an interruption."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import DiskError, UsageError
from .checkpoint import write_atomic
from .machine import commit, cpu_name, dirty, versions


class RunDirectory:
    """Paths and append-only rows of one run. Only the process that holds the lock writes to it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.checkpoints = self.root / "checkpoints"
        self.samples = self.root / "samples"
        self.stats = self.root / "stats.jsonl"
        self.metrics = self.root / "metrics.jsonl"
        self._lock = self.root / "lock"

    def create(self) -> None:
        """Make the folders of a new run.

        Raises:
            UsageError: the folder already holds a run. DiskError: it cannot be written to.
        """
        self.refuse_existing()
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise DiskError(f"--outdir {self.root} cannot be created: {error}") from error

    def refuse_existing(self) -> None:
        """Raise UsageError where the folder already holds a run."""
        if self.config.exists():
            raise UsageError(
                f"--outdir {self.root} already holds a run; continue it with `adafm train --resume {self.root}` "
                "or name another folder"
            )

    def open_existing(self) -> None:
        if not self.config.is_file():
            raise UsageError(f"{self.root} holds no run: there is no {self.config.name} in it")

    def lock(self) -> None:
        """Refuse a second live process on this run; a lock left behind by a dead one is taken over."""
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        for _ in range(2):
            try:
                descriptor = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                holder = self._holder()
                if holder is not None:
                    raise UsageError(
                        f"{self.root} is in use by process {holder['pid']} on {holder['host']}; wait for it, or remove "
                        f"{self._lock} if that process is gone"
                    ) from None
                self._lock.unlink(missing_ok=True)
                continue
            except OSError as error:
                raise DiskError(f"{self.root} cannot be written to: {error}") from error
            with os.fdopen(descriptor, "w") as file:
                file.write(mine)
            return
        raise UsageError(f"{self._lock} is taken by another process that started at the same moment; try again")

    def unlock(self) -> None:
        self._lock.unlink(missing_ok=True)

    def _holder(self) -> dict | None:
        try:
            holder = json.loads(self._lock.read_text())
            pid, host = int(holder["pid"]), holder["host"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if host == socket.gethostname():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return None
            except PermissionError:
                return holder
            if pid == os.getpid():
                return None
        return holder

    def append(self, path: Path, row: Mapping[str, object]) -> None:
        """Add one JSON line to ``path``."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_rows(self, step: int) -> None:
        """Drop rows and sample grids later than ``step``: a resumed run writes them again."""
        for path in (self.stats, self.metrics):
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # the last line of a killed run
                if row["step"] <= step:
                    kept.append(line)
            write_atomic(path, "".join(f"{line}\n" for line in kept))
        for picture in self.samples.glob("step*.png"):
            if int(picture.stem.removeprefix("step")) > step:
                picture.unlink()

    def write_environment(self, extra: Mapping[str, object]) -> None:
        """environment.json: versions, commit, machine, command line, and what ``extra`` adds."""
        environment = {
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **versions(),
            "git": {"commit": commit(), "dirty": dirty()},
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            **extra,
        }
        write_atomic(self.root / "environment.json", json.dumps(environment, indent=1))
