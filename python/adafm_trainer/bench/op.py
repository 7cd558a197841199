"""The ops on this machine: against what a user would write instead, and against a copy of the same bytes.

    adafm bench op --json FILE            python -m adafm_trainer.bench.op --json FILE   (the same, without tyro)

Every way to compute a case is held to float64 before anything of it is timed; a wrong one ends the run with code 1 and
no file. On a CPU every number of threads has a process of its own. How times are taken: measure.py; on a GPU: gpu.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from adafm_kernels.verify import verify

from ..trainer.machine import facts
from . import layer_cases, network_cases, variant_cases
from .case import Case, CheckError, Compiling, Setup
from .measure import CONTROL, SECOND, Clock, CpuClock, Ratio, geometric_mean, measure, summarise
from .op_table import table

MODULE = "adafm_trainer.bench.op"
ROUNDS = 50
# Seconds of measuring a case and attempt.
BUDGET = {"cpu": 1.5, "cuda": 0.5}
# A case whose control failed is measured again, this often at most; the number of attempts is in the result.
ATTEMPTS = 3
ROWS = {**layer_cases.ROWS, **network_cases.ROWS, **variant_cases.ROWS}


def run_ops(setup: Setup, threads: Sequence[int] = (1, 2), rounds: int = ROUNDS) -> dict:
    """Every case, on a CPU for each number of threads in a process of its own, as a JSON-ready dictionary.

    Raises CheckError where a result is wrong.
    """
    device = setup.device
    failed = [check for check in verify("compiled", device) if not check.passed]
    if failed:
        raise CheckError(f"{len(failed)} checks of `adafm doctor --verify` fail; first: {failed[0]}")
    start = time.monotonic()
    if device == "cuda":
        parts = [measure_cases(setup, rounds)]
    else:
        parts = [_in_process(count, rounds, setup) for count in threads]
    return {
        "name": "op",
        "device": device,
        "quick": setup.quick,
        **facts(device),
        "method": {"rounds": rounds, "seconds_a_case": BUDGET[device], "control": CONTROL},
        "seconds": round(time.monotonic() - start),
        "accepted": all(part["accepted"] for part in parts),
        "rows": ROWS,
        "runs": parts,
    }


def measure_cases(setup: Setup, rounds: int) -> dict:
    """All cases in this process."""
    clock = _clock(setup.device)
    # Collecting before every case is then a matter of microseconds: what was imported is not looked at.
    gc.collect()
    gc.freeze()
    start, complete = time.monotonic(), True
    cases, means = [], {}
    builders = (network_cases.network_cases, layer_cases.layer_cases, variant_cases.variant_cases)
    for case in chain.from_iterable(build(setup) for build in builders):
        case.check()
        found, ratios = _measure_case(case, clock, rounds, setup.device)
        cases.append(found)
        if case.mean:
            for name, ratio in ratios.items():
                means.setdefault(case.row, {}).setdefault(name, []).append(ratio)
        _progress(found)
        # The next case is built before this name is bound anew; its buffers should not lie beside these.
        del case
        if time.monotonic() - start > setup.seconds:
            complete = False
            break
        if setup.compiling.spent:
            torch._dynamo.reset()
        gc.collect()
    return {
        "threads": torch.get_num_threads() if setup.device == "cpu" else None,
        "accepted": all(case["accepted"] for case in cases),
        "complete": complete,
        "compile": {"seconds": round(setup.compiling.spent), "left_out": setup.compiling.left_out},
        "means": {
            row: {name: geometric_mean(r).to_json() for name, r in found.items()} for row, found in means.items()
        },
        "cases": cases,
    }


def _measure_case(case: Case, clock: Clock, rounds: int, device: str) -> tuple[dict, dict[str, Ratio]]:
    attempts, found, ratios, samples = 0, {"accepted": False}, {}, {}
    while not found["accepted"] and attempts < ATTEMPTS:
        samples = measure(case.methods, clock, rounds, BUDGET[device])
        found, ratios = summarise(samples, case.moved)
        attempts += 1
    head = {"row": case.row, "shape": case.shape, "bytes": case.moved, "mean": case.mean, "attempts": attempts}
    return {**head, **found, **_more(clock, case)}, ratios


def _more(clock: Clock, case: Case) -> dict:
    """What only this clock can say of a case: on a GPU the time inside kernels."""
    kernels = getattr(clock, "kernels", None)
    if kernels is None:
        return {}
    spent = kernels([method.run for method in case.methods])
    return {"kernel_us": {method.name: 1e6 * seconds for method, seconds in zip(case.methods, spent, strict=True)}}


def _clock(device: str) -> Clock:
    if device == "cpu":
        return CpuClock()
    from .gpu import GpuClock

    return GpuClock()


def _in_process(threads: int, rounds: int, setup: Setup) -> dict:
    """``measure_cases`` in a process with that many threads, which sleep while they wait."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", MODULE, "--part", str(part), "--rounds", str(rounds)]
        command += ["--quick"] * setup.quick + [
            "--compile-seconds",
            str(setup.compiling.limit),
            "--seconds",
            str(setup.seconds),
        ]
        environment = {**os.environ, **counts, "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode != 0:
            raise CheckError(f"measuring with {threads} threads ended with code {done.returncode}")
        return json.loads(part.read_text(encoding="utf-8"))


def _progress(case: dict) -> None:
    ours, control = case["methods"]["ours"]["median_us"], case["ratios"][SECOND]["median"]
    verdict = "" if case["accepted"] else f"  REJECTED, control {control:.3f}"
    print(f"{case['row']:24} {case['shape']:20} {ours:10.1f} us{verdict}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The flags, for both entries."""
    flags = argparse.ArgumentParser(prog="adafm bench op", description=__doc__.splitlines()[0])
    flags.add_argument("--json", type=Path, help="file for every number with the machine, versions and commit")
    flags.add_argument("--threads", type=_counts, default=(1, 2), help="numbers of threads on a CPU, such as 1,2")
    flags.add_argument("--rounds", type=int, default=ROUNDS, help="most paired rounds a case")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--quick", action="store_true", help="the smallest layers only: for tests")
    flags.add_argument(
        "--compile-seconds", type=float, default=math.inf,
        help="after so many seconds inside torch.compile leave it out; 0: leave it out altogether",
    )  # fmt: skip
    flags.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case after so many seconds; the table says so"
    )
    flags.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return flags


def main(argv: list[str] | None = None) -> int:
    """0: measured, also where the control rejects the run (the table says so); 1: a result is wrong; 3: no GPU."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("adafm bench op: torch sees no CUDA GPU here", file=sys.stderr)
        return 3
    setup = Setup(
        arguments.device, arguments.quick, Compiling(arguments.device, arguments.compile_seconds), arguments.seconds
    )
    try:
        if arguments.part is not None:
            _write(arguments.part, measure_cases(setup, arguments.rounds))
            return 0
        result = run_ops(setup, arguments.threads, arguments.rounds)
        result["command"] = " ".join(["adafm", "bench", "op", *words])
    except CheckError as error:
        print(f"adafm bench op: nothing is reported: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        _write(arguments.json, result)
    print(table(result))
    return 0


def _write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers of threads begin at 1")
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
