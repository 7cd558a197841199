"""A function in several processes, as `torchrun` would start them: each with its rank, all with one store."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait

import torch
from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
# The server imports these once and never computes, so its forks start at once and are safe.
_CONTEXT.set_forkserver_preload(["torch.distributed", "adafm_trainer.trainer.start", "tiny"])


@dataclass
class Outcome:
    """What one rank returned, or the error it raised (``kind``, ``text``); its exit code; the seconds it took."""

    value: object = None
    kind: str | None = None
    text: str = ""
    exit_code: int | None = None
    seconds: float = 0.0


def start_ranks(function: Callable, *arguments: object, world: int = 2) -> Ranks:
    """``function(rank, *arguments)`` in ``world`` processes; it must be importable by name."""
    return Ranks(function, arguments, world)


def run_ranks(function: Callable, *arguments: object, world: int = 2, seconds: float = 60) -> list[Outcome]:
    return start_ranks(function, *arguments, world=world).outcomes(seconds)


class Ranks:
    """Running processes, ended at the latest by ``outcomes``. Their store lives here, so it outlives them."""

    def __init__(self, function: Callable, arguments: tuple, world: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._started = time.monotonic()
        self._pipes, self.processes = [], []
        for rank in range(world):
            here, there = _CONTEXT.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            process = _CONTEXT.Process(target=_work, args=(there, environment, function, rank, arguments), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def outcomes(self, seconds: float = 60) -> list[Outcome]:
        """One for each rank; a rank that is still running after ``seconds`` is killed and fails the test."""
        found = [Outcome() for _ in self.processes]
        open_pipes = dict(zip(self._pipes, found, strict=True))
        deadline = time.monotonic() + seconds
        while open_pipes and time.monotonic() < deadline:
            for pipe in wait(list(open_pipes), timeout=0.5):
                outcome = open_pipes.pop(pipe)
                outcome.seconds = time.monotonic() - self._started
                try:
                    outcome.value, outcome.kind, outcome.text = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    outcome.kind = "died"
        late = [rank for rank, process in enumerate(self.processes) if self._pipes[rank] in open_pipes]
        for process, outcome in zip(self.processes, found, strict=True):
            if late:
                process.kill()
            process.join(10)
            outcome.exit_code = process.exitcode
        assert not late, f"ranks {late} were still running after {seconds} seconds"
        return found


def _work(pipe, environment: dict[str, str], function: Callable, rank: int, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        # Plain pickle takes tensors by value; the pipe's own would leave them in the memory of this process.
        pipe.send_bytes(pickle.dumps((function(rank, *arguments), None, "")))
    except BaseException as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps((None, type(error).__name__, str(error))))
        raise SystemExit(getattr(error, "exit_code", 1)) from error
