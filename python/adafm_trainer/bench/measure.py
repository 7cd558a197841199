"""Timing and statistics of op benchmarks.

Method: the ways to compute a case take turns, in an order shuffled anew in every round; each is called as often as
fills a sample. A ratio is the median of the paired ratios of the rounds, with a 95 % bootstrap interval. The control,
the measured op once more under another name, says what the ratio of two equal things looks like: a case whose control
lies outside CONTROL is rejected.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

OURS, SECOND, COPY = "ours", "ours (control)", "copy"
CONTROL = (0.95, 1.05)
LEAST_ROUNDS = 11
SAMPLE_SECONDS = 200e-6
MOST_CALLS = 2000
_DRAWS = 2000


@dataclass(frozen=True)
class Method:
    """One way to compute a case: ``run`` is what is timed; ``result`` gives its tensors, None: what ``run`` returns."""

    name: str
    run: Callable[[], Any]
    result: Callable[[], Any] | None = None


@dataclass
class Samples:
    """Seconds of a call, one number a round; ``cpu`` is process time (all threads), on a GPU the time to enqueue."""

    calls: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Clock(Protocol):
    """Times calls of a function: seconds of wall (or device) time and of processor (or enqueue) time for each call."""

    def time(self, run: Callable[[], Any], calls: int) -> tuple[float, float]: ...

    def calls(self, seconds: float) -> int: ...


class CpuClock:
    """Wall and process time of calls one after the other, behind one that is not timed: it leaves the caches as the
    op itself does, whichever op ran before."""

    def time(self, run: Callable[[], Any], calls: int) -> tuple[float, float]:
        run()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall / calls, cpu / calls

    def calls(self, seconds: float) -> int:
        """How many calls make up a sample."""
        return min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / seconds)))


def measure(methods: Sequence[Method], clock: Clock, rounds: int, budget: float) -> dict[str, Samples]:
    """Samples of every method, and of the first under the name SECOND: ``rounds`` of them, fewer (but LEAST_ROUNDS)
    where they would take more than ``budget`` seconds."""
    first, *others = methods
    methods = [first, Method(SECOND, first.run), *others]
    found, cost = {}, 0.0
    for method in methods:
        method.run()
        start = time.perf_counter()
        seconds = min(clock.time(method.run, 1)[0] for _ in range(3))
        calls = clock.calls(max(seconds, 1e-9))
        found[method.name] = Samples(calls)
        # What a clock does beside the call (on a GPU it empties the cache) costs time too.
        cost += max(seconds * calls, (time.perf_counter() - start) / 3)
    rounds = max(min(rounds, LEAST_ROUNDS), min(rounds, int(budget / cost)))
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(methods)
            for method in methods:
                samples = found[method.name]
                wall, cpu = clock.time(method.run, samples.calls)
                samples.wall.append(wall)
                samples.cpu.append(cpu)
    finally:
        if collecting:
            gc.enable()
    return found


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share ``q`` of the values does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its bootstrap distribution."""

    median: float
    draws: np.ndarray

    def to_json(self) -> dict[str, float]:
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return {"median": float(self.median), "low": float(low), "high": float(high)}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio:
    """Median of ``numerator[k] / denominator[k]``, with medians of rounds drawn with replacement.

    Raises ValueError where the two have different lengths or none.
    """
    if len(numerator) != len(denominator) or not numerator:
        raise ValueError(f"{len(numerator)} and {len(denominator)} rounds cannot be paired")
    ratios = np.asarray(numerator) / np.asarray(denominator)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(_DRAWS, len(ratios)))
    return Ratio(statistics.median(ratios.tolist()), np.median(ratios[picks], axis=1))


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """Geometric mean over cases, its interval from the cases' own (independent) draws."""
    if not ratios:
        raise ValueError("there is no ratio to take the mean of")
    median = math.exp(statistics.fmean(math.log(ratio.median) for ratio in ratios))
    chance = np.random.default_rng(1)
    logs = [np.log(chance.permutation(ratio.draws)) for ratio in ratios]
    return Ratio(median, np.exp(np.mean(logs, axis=0)))


def control_holds(ratio: float) -> bool:
    """Whether the ratio of two equal things is near enough to 1 for the case's other ratios to mean something."""
    return CONTROL[0] <= ratio <= CONTROL[1]


def summarise(samples: dict[str, Samples], moved: int) -> tuple[dict, dict[str, Ratio]]:
    """Times of every method and ``method / ours`` of every other, JSON-ready; and the ratios with their draws.

    ``moved``: bytes that the op has to read and write.
    """
    methods = {}
    for name, found in samples.items():
        median = statistics.median(found.wall)
        methods[name] = {
            "median_us": 1e6 * median,
            "p20_us": 1e6 * quantile(found.wall, 0.2),
            "p80_us": 1e6 * quantile(found.wall, 0.8),
            "cpu_us": 1e6 * statistics.median(found.cpu),
            "calls": found.calls,
        }
    ours = samples[OURS].wall
    ratios = {name: paired_ratio(found.wall, ours) for name, found in samples.items() if name != OURS}
    rounds = len(ours)
    case = {
        "rounds": rounds,
        "methods": methods,
        "ratios": {name: ratio.to_json() for name, ratio in ratios.items()},
        "gbytes_per_second": moved / methods[OURS]["median_us"] / 1e3,
        "accepted": control_holds(ratios[SECOND].median),
    }
    return case, ratios
