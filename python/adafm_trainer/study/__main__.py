"""`python -m adafm_trainer.study`: carry out the study, continue it, and write what it found."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from adafm_kernels import __version__

from ..data.packaged import GENERATORS, packaged_file
from ..errors import AdafmError, Interrupted, UsageError
from ..metrics.extractors import efflite0_installed, get_extractor
from ..trainer.checkpoint import write_atomic
from ..trainer.machine import cpu_name
from ..trainer.rundir import RunDirectory
from ..trainer.signals import StopRequest
from . import findings, parts, present
from .images import require_packages
from .plan import FULL, QUICK, Part, Run, Scale
from .runner import Runner

HOURS = 8.0
RESULTS = Path("benchmarks/results/study")
NOT_HELD = 1


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 an asserted claim does not hold, 75 stopped before the end, or that of an error."""
    flags = argparse.ArgumentParser(prog="python -m adafm_trainer.study", description=__doc__)
    flags.add_argument("--parts", help="comma-separated parts (default: all)")
    flags.add_argument("--outdir", type=Path, help="runs are kept here (default runs/study; runs/study-quick)")
    flags.add_argument("--results", type=Path, help=f"results go here (default {RESULTS}; OUTDIR/results with --quick)")
    flags.add_argument("--quick", action="store_true", help="a few tiny steps of everything: does the study work?")
    flags.add_argument("--hours", type=float, default=HOURS, help="start no further run after this long (default 8)")
    given = flags.parse_args(arguments)
    outdir = given.outdir or Path("runs/study-quick" if given.quick else "runs/study")
    results = given.results or (outdir / "results" if given.quick else RESULTS)
    try:
        return study(outdir, results, given.parts, given.quick, given.hours)
    except AdafmError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code


def study(outdir: Path, results: Path, names: str | None, quick: bool, hours: float) -> int:
    """Run the parts ``names`` (None: all), then write what all parts found that are done.

    Raises:
        UsageError: an unknown part, a missing package, or another process on ``outdir``.
        Interrupted: the time is up; what was found is written all the same.
    """
    scale = QUICK if quick else FULL
    everything = parts.parts(scale)
    chosen = _chosen(everything, names)
    skipped = _without_outside(chosen)
    chosen = [part for part in chosen if part.name not in skipped]
    _require(chosen, scale)
    runner = Runner(outdir, scale, lambda text: print(text, flush=True), time.monotonic() + hours * 3600)
    whole = RunDirectory(outdir)
    whole.lock()
    try:
        with StopRequest() as stop:
            for run in _runs(chosen):
                runner.do(run)
                if stop.requested:
                    raise Interrupted(f"asked to stop after {run.name}; the same command continues")
    finally:
        result = _write(runner, everything, list(skipped.values()), results)
        whole.unlock()
    failed = [f["claim"] for f in result["findings"] if f["asserted"] and not f["holds"]]
    for claim in failed:
        print(f"does not hold: {claim}", file=sys.stderr)
    return NOT_HELD if failed else 0


def _chosen(everything: tuple[Part, ...], names: str | None) -> list[Part]:
    if names is None:
        return list(everything)
    wanted = names.split(",")
    known = [part.name for part in everything]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"--parts {names}: there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    return [part for part in everything if part.name in wanted]


def _without_outside(chosen: list[Part]) -> dict[str, str]:
    """Parts that cannot be done here, and why: the generators of others are nobody's dependency."""
    for entry in GENERATORS.values():
        try:
            packaged_file(*entry)
        except UsageError as error:
            if any(part.name == "outside" for part in chosen):
                print(f"outside: left out, {error}")
                return {"outside": f"outside, {error}"}
    return {}


def _require(chosen: Sequence[Part], scale: Scale) -> None:
    """UsageError where a package is missing that some run would miss only after hours."""
    for images in {run.images for part in chosen for run in part.runs}:
        require_packages(images)
    if not efflite0_installed():
        get_extractor(scale.extractor)


def _write(runner: Runner, everything: tuple[Part, ...], skipped: list[str], results: Path) -> dict:
    """results.json, table.md and the charts, of the parts that are complete."""
    complete = [part for part in everything if all(runner.done(run) for run in part.runs)]
    found = [finding.to_json() for part in complete for finding in findings.find(part, runner)]
    seconds = {part.name: round(sum(runner.seconds(run) for run in part.runs), 1) for part in everything}
    missing = [part.name for part in everything if part not in complete]
    result = {
        "name": "study",
        "conditions": _conditions(runner, [run for part in complete for run in part.runs], seconds),
        "findings": found,
        "skipped": [*skipped, *(f"{name}, not (all) run" for name in missing if name != "outside" or not skipped)],
        "seconds": seconds,
        "diverged": [run.name for run in _runs(everything) if runner.diverged(run)],
        "scale": vars(runner.scale),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_atomic(results / "results.json", json.dumps(result, indent=1) + "\n")
    write_atomic(results / "table.md", present.markdown(result))
    drawn = present.charts(result)
    for old in results.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, text in drawn.items():
        write_atomic(results / name, text)
    print(f"results: {results / 'results.json'}, {results / 'table.md'} and {len(drawn)} charts")
    return result


def _conditions(runner: Runner, runs: Sequence[Run], seconds: dict[str, float]) -> str:
    scale, begun = runner.scale, [runner.environment(run) for run in runs]
    commits = Counter(environment.get("git", {}).get("commit", "not recorded") for environment in begun)
    threads = " or ".join(map(str, sorted({environment["threads"] for environment in begun})))
    counted = ", ".join(f"{name} {count}" for name, count in commits.most_common())
    return (
        f"{cpu_name()}, {threads} threads, torch {torch.__version__}, adafm_kernels {__version__}, {len(runs)} runs, "
        f"by commit: {counted}; {len(scale.seeds)} seeds, drawings and digits of 32 and 28 px, {scale.samples} samples "
        f"an evaluation; {sum(seconds.values()) / 3600:.2f} hours of runs. Intervals are Student's for the mean over "
        "the seeds."
    )


def _runs(everything: Sequence[Part]) -> list[Run]:
    return [run for part in everything for run in part.runs]


if __name__ == "__main__":
    sys.exit(main())
