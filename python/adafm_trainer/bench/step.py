"""Training steps on this machine: ours against the authors' code, plain trainable convolutions and full fine-tuning.

    adafm bench step --json FILE          python -m adafm_trainer.bench.step --json FILE   (the same, without tyro)

Every configuration is a process of its own; they take turns, in an order shuffled anew in every round, and a ratio is
the median of the paired ratios of the rounds with its 95 % bootstrap interval. A second process of ours is the
control. The first iteration of every configuration is compared with that of ours in float32 before anything is timed:
a wrong one ends the run with code 1 and no file. How: step_rounds.py; what: step_cases.py, step_ways.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..trainer.machine import facts
from .case import CheckError
from .measure import OURS, SECOND
from .step_bars import judge_bars
from .step_cases import cases
from .step_rounds import CONTROL, measure_case
from .step_table import table
from .step_ways import GRAPHED, WAYS, fast_type
from .step_workers import GIVE_BACK

ROUNDS = 15
# Names of the configurations on the command line.
_SHORT = dict(zip(("published", "switched", "compile", "leaf", "full", "graphs"), list(WAYS)[2:], strict=True))


def short_ways(device: str) -> dict[str, str]:
    """The configurations beside ours that ``device`` can have, by their names on the command line."""
    return {name: way for name, way in _SHORT.items() if device == "cuda" or way != GRAPHED}


def run_steps(
    device: str,
    quick: bool = False,
    rounds: int = ROUNDS,
    threads: int | None = None,
    others: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    memory: int | None = None,
    done: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Every case (or those ``chosen`` by name) as a JSON-ready dictionary; ``done`` gets it after each case.

    ``others``: configurations beside ours and its control, None: all that the device can have; ``memory``: bytes that
    the processes may take together.

    Raises CheckError where a configuration does not compute what it should.
    """
    threads = threads or len(os.sched_getaffinity(0))
    others = list(short_ways(device).values()) if others is None else others
    start, found, result = time.monotonic(), [], {}
    head = {
        "name": "step",
        "device": device,
        "quick": quick,
        **facts(device),
        "threads": threads,
        "type": str(fast_type(device) or torch.float32).removeprefix("torch."),
        "method": {"rounds": rounds, "control": CONTROL, "mmap_threshold": GIVE_BACK["MALLOC_MMAP_THRESHOLD_"]},
    }
    for case in cases(device, quick):
        if chosen is not None and case.name not in chosen:
            continue
        found.append(measure_case(case, [OURS, SECOND, *others], device, quick, threads, rounds, memory))
        result = {
            **head,
            "seconds": round(time.monotonic() - start),
            "accepted": all(case["accepted"] for case in found),
            "configurations": WAYS,
            "cases": found,
            "bars": judge_bars(found),
        }
        done(result)
    return result


def parser() -> argparse.ArgumentParser:
    """The flags, for both entries."""
    flags = argparse.ArgumentParser(prog="adafm bench step", description=__doc__.splitlines()[0])
    flags.add_argument("--json", type=Path, help="file for every number with the machine, versions and commit")
    flags.add_argument("--rounds", type=int, default=ROUNDS, help="paired rounds of a case")
    flags.add_argument("--threads", type=int, help="threads of a process; as many as there are CPUs by default")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--cases", help="only these, such as adafm-128,demo")
    flags.add_argument("--ways", help=f"only these beside ours and its control: {','.join(_SHORT)} (on a GPU)")
    flags.add_argument("--memory", type=float, help="GiB that the processes may take together; what is free by default")
    flags.add_argument("--quick", action="store_true", help="tiny pairs: for tests")
    return flags


def main(argv: list[str] | None = None) -> int:
    """0: measured, also where a control rejects its set (the table says so); 1: a result is wrong; 3: no GPU."""
    words = sys.argv[1:] if argv is None else argv
    flags = parser()
    given = flags.parse_args(words)
    if given.rounds < 1 or (given.threads is not None and given.threads < 1):
        flags.error(f"--rounds {given.rounds} --threads {given.threads}: both must be at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("adafm bench step: torch sees no CUDA GPU here", file=sys.stderr)
        return 3
    known = [case.name for case in cases(given.device, given.quick)]
    chosen = _chosen(flags, "--cases", given.cases, known)
    short = short_ways(given.device)
    others = [short[name] for name in _chosen(flags, "--ways", given.ways, list(short))]
    memory = None if given.memory is None else int(given.memory * 2**30)
    command = " ".join(["adafm", "bench", "step", *words])

    def write(result: dict) -> None:
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**result, "command": command}, indent=1)
            given.json.write_text(text + "\n", encoding="utf-8")

    try:
        result = run_steps(
            given.device, given.quick, given.rounds, given.threads, others, chosen, memory, write
        )  # fmt: skip
    except CheckError as error:
        print(f"adafm bench step: nothing is reported: {error}", file=sys.stderr)
        return 1
    print(table({**result, "command": command}))
    return 0


def _chosen(flags: argparse.ArgumentParser, flag: str, text: str | None, known: list[str]) -> list[str]:
    names = known if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        flags.error(f"{flag} {','.join(unknown)}: expected some of {','.join(known)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
