"""A process that holds one configuration of a training step and takes its parts when told to.

Commands come as JSON lines on standard input, answers go to standard output, one line each; the first answer comes by
itself, when the configuration is built and its first iteration was compared. The configuration ``REFERENCE`` writes
the start values and its own first iteration for the others, and ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from ..trainer.graphs import EAGER_STEPS
from .measure import OURS, SECOND
from .step_cases import Start, StepCase, cases, make_start
from .step_check import First, compare, first_iteration, networks_bytes, same_bits
from .step_launches import count
from .step_ways import GRAPHED, PUBLISHED, REFERENCE, Run, build, fast_type

START, FIRST = "start.pt", "first.pt"
G_STEP, D_STEP, D_STEP_R1, REAL_PASS = "G step", "D step", "D step with R1", "real-image pass"


def parts(run: Run) -> dict[str, Callable[[], Any]]:
    """What can be timed, by name; the average belongs to the generator's step."""
    return {
        G_STEP: lambda: (run.generator(), run.average()),
        D_STEP: lambda: run.discriminator(False),
        D_STEP_R1: lambda: run.discriminator(True),
        REAL_PASS: run.real_pass,
    }


def timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of wall time and of processor time (all threads) of one call."""
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def prepare(case: StepCase, way: str, device: str, folder: Path) -> tuple[Run, dict]:
    """The configuration and what is known of it before anything is timed."""
    before = resident()
    run = build(case, way, device, _start(folder))
    # Gradients go to a file, so that no copy of them counts as memory of the step.
    losses = first_iteration(run, lambda network, gradients: _put(_file(folder, network), gradients)).losses
    # Adam's moments and the allocator's pools are there from the second iteration on, graphs after their capture.
    repeated = (G_STEP, D_STEP, D_STEP_R1) * (EAGER_STEPS + 1) if way == GRAPHED else (G_STEP, D_STEP_R1)
    for part in repeated:
        parts(run)[part]()
    _wait(device)
    fast = fast_type(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _grown(before)
    held = resident()
    found = First(losses, {network: _load(_file(folder, network)) for network in losses})
    expected = First(**_load(folder / FIRST))
    errors = compare(found, expected, _start(folder), way)
    for network in losses:
        _file(folder, network).unlink()
    answer = {
        "errors": errors,
        "type": str((None if way == PUBLISHED else fast) or torch.float32).removeprefix("torch."),
        "peak_bytes": peak,
        "resident_bytes": held,
        "room_bytes": room(device),
        "modulated_bytes": networks_bytes(run.networks, fast) if way in (OURS, SECOND) else None,
    }
    return run, answer


def refer(case: StepCase, device: str, folder: Path) -> dict:
    """Write start values and the first iteration of ours in float32."""
    start = make_start(case)
    torch.save(vars(start), folder / START)
    run = build(case, REFERENCE, device, start)
    torch.save(asdict(first_iteration(run)), folder / FIRST)
    return {"bits": same_bits(run)} if case.passes else {}


def serve(run: Run, device: str, commands: TextIO, answers: TextIO) -> None:
    """Answer until the input ends."""
    gc.collect()
    gc.freeze()
    for line in commands:
        command = json.loads(line)
        if command["do"] == "count":
            answer = count(run, device)
        else:
            answer = {name: timed(parts(run)[name], device) for name in command["parts"]}
        _answer(answers, answer)
    gc.unfreeze()


def resident() -> int:
    """Bytes of this process that lie in memory now; 0 where /proc does not tell."""
    return _status("VmRSS")


def room(device: str) -> int | None:
    """Bytes that this process and further ones can have together; None where it is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.max_memory_reserved()
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    free = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(free.split()[1]) * 1024 + resident()


def _start(folder: Path) -> Start:
    return Start(**_load(folder / START))


def _load(path: Path) -> dict:
    return torch.load(path, weights_only=True, mmap=True, map_location="cpu")


def _put(path: Path, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.save(gradients, path)
    return {}


def _file(folder: Path, network: str) -> Path:
    return folder / f"{os.getpid()}-{network}.pt"


def _grown(before: int) -> int | None:
    most = _status("VmHWM")
    return most - before if most else None


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _answer(stream: TextIO, answer: dict) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m adafm_trainer.bench.step_child", description=__doc__.splitlines()[0]
    )
    flags.add_argument("--case", required=True)
    flags.add_argument("--way", required=True)
    flags.add_argument("--device", choices=("cpu", "cuda"), required=True)
    flags.add_argument("--folder", type=Path, required=True)
    flags.add_argument("--quick", action="store_true")
    given = flags.parse_args(argv)
    # Whatever prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = next(case for case in cases(given.device, given.quick) if case.name == given.case)
    if given.way == REFERENCE:
        _answer(answers, refer(case, given.device, given.folder))
        return 0
    run, answer = prepare(case, given.way, given.device, given.folder)
    _answer(answers, answer)
    serve(run, given.device, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
