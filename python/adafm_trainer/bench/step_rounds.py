"""Paired rounds of a training step: one process for each configuration, told in turn to take an iteration.

All of them hold their networks at the same time and sleep but one. As many as fit into memory do so together; where
that is not all, ours and its control come again in every further set. A set whose control fails is measured again.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .baselines import cannot_compile
from .case import CheckError
from .measure import OURS, SECOND, Samples, paired_ratio, quantile
from .step_cases import StepCase
from .step_check import judge
from .step_child import D_STEP, D_STEP_R1, G_STEP, REAL_PASS
from .step_ways import COMPILED, REFERENCE, SWITCHED
from .step_workers import GIVE_BACK, Child, Worker, together

ITERATION = "iteration"
CONTROL = (0.98, 1.02)
# Parts whose control has to hold: each is measured in rounds of its own.
COMPARED = (ITERATION, REAL_PASS)
# A set whose control failed is measured again, this often at most in all; the number of attempts is in the result.
ATTEMPTS = 3
WARM_UP = 1
# Rounds of what is shown but not compared with a bar.
FEW_ROUNDS = 5
Parts = dict[str, Samples]


def measure_case(
    case: StepCase, ways: Sequence[str], device: str, quick: bool, threads: int, rounds: int, memory: int | None
) -> dict:
    """All configurations ``ways`` of a case, JSON-ready. ``memory``: bytes that the processes may take; None: found.

    Raises CheckError where a configuration does not compute what ours does; torch.compile is left out then.
    """
    left_out = {}
    if COMPILED in ways and (reason := cannot_compile(device)):
        left_out[COMPILED] = reason
    # First the one by whose errors the others are judged.
    others = sorted((way for way in ways if way not in (OURS, SECOND, *left_out)), key=lambda way: way != SWITCHED)
    interval, sets, rows, autocast = case.config.r1_interval, [], {}, None
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"device": device, "quick": quick, "threads": threads, "folder": Path(folder)}
        start = partial(Child, case.name, **arguments)
        with start(REFERENCE) as reference:
            bits = reference.known.get("bits")
        # On a GPU every process knows its own peak.
        peaks = (
            _peaks(case, (OURS, *others), partial(start, environment=GIVE_BACK), left_out) if device == "cpu" else {}
        )
        others = [way for way in others if way not in left_out]
        while others or not sets:
            with ExitStack() as stack:
                workers = {way: stack.enter_context(start(way)) for way in (OURS, SECOND)}
                places = max(1, together(workers[OURS].known, memory) - len(workers))
                now, others = others[:places], others[places:]
                for way in now:
                    try:
                        workers[way] = stack.enter_context(start(way))
                        _judge(case, way, workers[way].known, autocast)
                    except CheckError as error:
                        if way != COMPILED:
                            raise
                        left_out[way] = str(error)
                        workers.pop(way, None)
                    if way == SWITCHED:
                        autocast = workers[way].known["errors"]
                for way in (OURS, SECOND):
                    _judge(case, way, workers[way].known, autocast)
                if sets and len(workers) == 2:
                    continue
                samples, attempts = measure_set(workers, interval, case.passes, rounds, 1 if quick else ATTEMPTS)
                head, found = summarise_set(samples, interval)
                sets.append({"configurations": list(workers), "attempts": attempts, **head})
                for way, row in found.items():
                    if way not in rows:
                        counted = workers[way].ask(do="count")
                        shown = _shown(workers[way].known, case.batch, row)
                        if device == "cpu":
                            shown["peak_bytes"] = peaks.get(way)
                        rows[way] = {**row, **shown, "launches": counted}
                        _progress(case, way, row)
    return {
        "name": case.name,
        "title": case.title,
        "batch": case.batch,
        "interval": interval,
        "accepted": all(found["accepted"] for found in sets),
        "bits": bits,
        "left_out": left_out,
        "sets": sets,
        "ways": {way: rows[way] for way in ways if way in rows},
    }


def _peaks(
    case: StepCase, ways: Sequence[str], start: Callable[[str], Child], left_out: dict[str, str]
) -> dict[str, int | None]:
    """Most memory of each configuration in a process that is not timed; one that torch.compile fails is left out."""
    found = {}
    for way in ways:
        try:
            with start(way) as child:
                found[way] = child.known["peak_bytes"]
        except CheckError as error:
            if way != COMPILED:
                raise
            left_out[way] = str(error)
        print(f"{case.name:15} {way}: peak memory measured", file=sys.stderr, flush=True)
    return found


def measure_set(
    workers: Mapping[str, Worker], interval: int, passes: bool, rounds: int, most: int = ATTEMPTS
) -> tuple[dict[str, Parts], int]:
    """Samples of every part by configuration, and after how many attempts, at ``most`` so many, the control held."""
    main = [G_STEP, D_STEP_R1] if interval == 1 else [G_STEP, D_STEP, D_STEP_R1]
    ordered = [way for way in (OURS, SECOND, SWITCHED) if way in workers]
    attempts, samples = 0, {}
    while attempts < most:
        samples = take_rounds(workers, list(workers), main, rounds)
        attempts += 1
        if summarise_set(samples, interval)[0]["accepted"]:
            break
        print(f"  the control left {CONTROL[0]} to {CONTROL[1]}, attempt {attempts}", file=sys.stderr, flush=True)
    if interval == 1:
        _join(samples, take_rounds(workers, list(workers), [D_STEP], min(rounds, FEW_ROUNDS)))
    if passes and SWITCHED in workers:
        for _ in range(most):
            found = take_rounds(workers, ordered, [REAL_PASS], rounds)
            if holds(_ratio(found, SECOND, REAL_PASS)):
                break
        _join(samples, found)
    return samples, attempts


def take_rounds(workers: Mapping[str, Worker], ways: Sequence[str], parts: list[str], rounds: int) -> dict[str, Parts]:
    """``rounds`` samples of ``parts``, one after the other as in an iteration; the order of ``ways`` is shuffled anew
    in every round."""
    found = {way: {part: Samples(1) for part in parts} for way in ways}
    chance, order = random.Random(0), list(ways)
    for number in range(WARM_UP + rounds):
        chance.shuffle(order)
        for way in order:
            answer = workers[way].ask(do="time", parts=parts)
            if number >= WARM_UP:
                for part, (wall, cpu) in answer.items():
                    found[way][part].wall.append(wall)
                    found[way][part].cpu.append(cpu)
    return found


def iteration(parts: Parts, interval: int) -> Samples:
    """A mean iteration of every round: the penalty is taken in one of ``interval`` discriminator steps."""
    share = 1.0 / interval
    made = Samples(1)
    for kind in ("wall", "cpu"):
        g, penalised = (getattr(parts[part], kind) for part in (G_STEP, D_STEP_R1))
        plain = getattr(parts[D_STEP], kind) if interval > 1 else penalised
        mean = [a + share * b + (1 - share) * c for a, b, c in zip(g, penalised, plain, strict=True)]
        getattr(made, kind).extend(mean)
    return made


def summarise_set(samples: dict[str, Parts], interval: int) -> tuple[dict, dict[str, dict]]:
    """Whether the control held, and by configuration times of every part and their ratios to ours."""
    whole = {way: {ITERATION: iteration(parts, interval), **parts} for way, parts in samples.items()}
    rows = {}
    for way, parts in whole.items():
        times = {part: _times(found) for part, found in parts.items() if found.wall}
        rows[way] = {"times": times}
        if way != OURS:
            rows[way]["ratios"] = {part: _ratio(whole, way, part) for part in times}
    control = rows[SECOND]["ratios"]
    compared = [control[part] for part in COMPARED if part in control]
    return {"accepted": all(map(holds, compared)), "control": control}, rows


def holds(ratio: dict[str, float]) -> bool:
    """Whether the ratio of ours to ours is near enough to 1 for the others to mean something."""
    return CONTROL[0] <= ratio["median"] <= CONTROL[1]


def _judge(case: StepCase, way: str, known: dict, autocast: dict | None) -> None:
    judge(known["errors"], known["type"], None if way == SWITCHED else autocast, f"{case.name}, {way}")


def _shown(known: dict, batch: int, row: dict) -> dict:
    seconds = row["times"][ITERATION]["median_ms"] / 1e3
    kept = {name: known[name] for name in ("errors", "type", "peak_bytes", "modulated_bytes")}
    return {"images_per_second": batch / seconds, **kept}


def _times(samples: Samples) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(samples.wall),
        "p20_ms": 1e3 * quantile(samples.wall, 0.2),
        "p80_ms": 1e3 * quantile(samples.wall, 0.8),
        "cpu_ms": 1e3 * statistics.median(samples.cpu),
        "rounds": len(samples.wall),
    }


def _ratio(samples: Mapping[str, Parts], way: str, part: str) -> dict[str, float]:
    return paired_ratio(samples[way][part].wall, samples[OURS][part].wall).to_json()


def _join(samples: dict[str, Parts], more: dict[str, Parts]) -> None:
    for way, parts in more.items():
        samples[way].update(parts)


def _progress(case: StepCase, way: str, row: dict) -> None:
    ratio = f", {row['ratios'][ITERATION]['median']:.3f} of ours" if "ratios" in row else ""
    print(f"{case.name:15} {way}: {row['times'][ITERATION]['median_ms']:.1f} ms{ratio}", file=sys.stderr, flush=True)
