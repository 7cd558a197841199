"""The bars that a step has to meet, and whether a result meets them."""

from __future__ import annotations

from dataclasses import dataclass

from .measure import OURS
from .step_child import D_STEP_R1, REAL_PASS
from .step_rounds import ITERATION
from .step_ways import LEAF, PUBLISHED, SWITCHED

# Calls of our own that modulate, reduce, update and average one network in one step.
MOST_CALLS = 4


@dataclass(frozen=True)
class Bar:
    """``way``'s time over ours in ``part`` of ``case``: at least ``least``, or ours over it at most ``most``."""

    case: str
    part: str
    way: str
    least: float | None = None
    most: float | None = None


# Of the sizes measured on a CPU.
BARS = (
    Bar("adafm-128", ITERATION, PUBLISHED, least=2.2),
    Bar("adafm-128", ITERATION, SWITCHED, least=1.12),
    Bar("adafm-128", ITERATION, LEAF, most=1.04),
    Bar("modulated-256", ITERATION, SWITCHED, least=1.25),
    Bar("modulated-256", ITERATION, LEAF, most=1.04),
    Bar("adafm-128", REAL_PASS, SWITCHED, least=1.2),
    Bar("adafm-128", D_STEP_R1, SWITCHED, least=1.12),
)


def judge_bars(cases: list[dict]) -> list[dict]:
    """Every bar with what was measured: ``holds`` is None where something it needs was not measured."""
    named = {case["name"]: case for case in cases}
    found = [_judge_time(bar, named.get(bar.case)) for bar in BARS]
    for case in cases:
        found += [*_judge_bits(case), *_judge_launches(case), *_judge_memory(case)]
    return found


def _judge_time(bar: Bar, case: dict | None) -> dict:
    text = f"{bar.way} / ours, at least {bar.least}" if bar.least else f"ours / {bar.way}, at most {bar.most}"
    ratio = None
    if case is not None and bar.way in case["ways"]:
        ratio = case["ways"][bar.way]["ratios"].get(bar.part)
    if ratio is None:
        return _bar(bar.case, f"{bar.part}: {text}", None, "not measured")
    if bar.least is not None:
        return _bar(bar.case, f"{bar.part}: {text}", ratio["high"] >= bar.least, _interval(ratio))
    inverse = {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
    return _bar(bar.case, f"{bar.part}: {text}", inverse["low"] <= bar.most, _interval(inverse))


def _judge_bits(case: dict) -> list[dict]:
    bits = case["bits"]
    if bits is None:
        return []
    text = f"{REAL_PASS}: gradients bit-identical in float32"
    return [_bar(case["name"], text, bits["equal"] == bits["of"], f"{bits['equal']} of {bits['of']} tensors")]


def _judge_launches(case: dict) -> list[dict]:
    if OURS not in case["ways"]:
        return []
    counted = {
        way: case["ways"][way]["launches"]["parts"] for way in (OURS, PUBLISHED, SWITCHED) if way in case["ways"]
    }
    found = []
    for network in counted[OURS]:
        calls, *theirs = (sum(parts[network].values()) for parts in counted.values())
        beside = f"; the authors' code {' and '.join(map(str, theirs))}" if theirs else ""
        text = f"{network}: calls that modulate, reduce, update and average, at most {MOST_CALLS}"
        found.append(_bar(case["name"], text, calls <= MOST_CALLS, f"{calls}{beside}"))
    return found


def _judge_memory(case: dict) -> list[dict]:
    ours, leaf = (case["ways"].get(way) for way in (OURS, LEAF))
    text = "peak memory: at most that of plain leaf, W' and the state of gamma and beta"
    if ours is None or leaf is None or not ours["peak_bytes"] or not leaf["peak_bytes"]:
        return [_bar(case["name"], text, None, "not measured")]
    allowed = leaf["peak_bytes"] + sum(ours["modulated_bytes"].values())
    measured = f"{ours['peak_bytes'] / 2**20:.0f} of {allowed / 2**20:.0f} MiB"
    return [_bar(case["name"], text, ours["peak_bytes"] <= allowed, measured)]


def _bar(case: str, text: str, holds: bool | None, measured: str) -> dict:
    return {"case": case, "text": text, "holds": holds, "measured": measured}


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
