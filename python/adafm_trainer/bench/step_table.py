"""Markdown tables of `adafm bench step`: every case, the bars, and the conditions."""

from __future__ import annotations

from .measure import OURS, SECOND
from .step_child import D_STEP, D_STEP_R1, G_STEP, REAL_PASS
from .step_rounds import COMPARED, ITERATION, holds

_PARTS = (G_STEP, D_STEP, D_STEP_R1, REAL_PASS)


def table(result: dict) -> str:
    """Every case, the bars and the conditions."""
    return "\n\n".join([*(case_table(result, case) for case in result["cases"]), bars(result), conditions(result)])


def case_table(result: dict, case: dict) -> str:
    """One row for each configuration."""
    interval = case["interval"]
    every = "R1 in every step" if interval == 1 else f"R1 in every {interval}th step"
    lines = [
        f"{case['title'][0].upper()}{case['title'][1:]}, batch {case['batch']}, {every}",
        "",
        "| configuration | iteration, ms (p20 to p80) | processor, ms | images/s | time / ours (95 %) | peak MiB | "
        f"launches | {', '.join(_shown_parts(case))}, ms |",
        "|---" * 8 + "|",
    ]
    for way, row in case["ways"].items():
        whole = row["times"][ITERATION]
        ratio = f"{_interval(row['ratios'][ITERATION])}{_loses(row, way)}" if "ratios" in row else "1"
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else ""
        counts = row["launches"]["total"].values()
        launches = "" if None in counts else sum(counts)
        parts = " / ".join(
            f"{row['times'][part]['median_ms']:.{_digits(row)}f}" if part in row["times"] else "-"
            for part in _shown_parts(case)
        )
        lines.append(
            f"| {way} | {whole['median_ms']:.{_digits(row)}f} ({whole['p20_ms']:.{_digits(row)}f} to "
            f"{whole['p80_ms']:.{_digits(row)}f}) | {whole['cpu_ms']:.{_digits(row)}f} | "
            f"{row['images_per_second']:.2f} | {ratio} | {peak} | {launches} | {parts} |"
        )
    lines += [f"| {way} | left out: {reason} |||||||" for way, reason in case["left_out"].items()]
    return "\n".join(lines)


def bars(result: dict) -> str:
    """What has to hold, what was measured, and whether it does."""
    words = {True: "holds", False: "**missed**", None: "not judged"}
    lines = ["| bar | measured (95 %) | |", "|---|---|---|"]
    lines += [f"| {bar['case']}, {bar['text']} | {bar['measured']} | {words[bar['holds']]} |" for bar in result["bars"]]
    return "\n".join(lines)


def conditions(result: dict) -> str:
    """Machine, versions, commit, and what of it the control rejected, in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    machine = f"{result['cpu']}, {result['threads']} threads"
    if "gpu" in result:
        machine = f"{result['gpu']}, driver {result['driver']}, {machine}"
    state = {True: " with uncommitted changes", False: "", None: ""}[result["dirty"]]
    low, high = result["method"]["control"]
    counted = "kernels and copies" if "gpu" in result else "operators that reach a backend"
    text = (
        f"{machine}; {versions}; commit {result['commit']}{state}; {result['type']} where autocast is on; "
        f"{result['method']['rounds']} paired rounds, one process a configuration; `{result['command']}`. "
        f"{_memory(result)} Launches: {counted} in one iteration with R1."
    )
    rejected = [
        f"{case['name']}, {part} {ratio['median']:.3f}"
        for case in result["cases"]
        for found in case["sets"]
        for part, ratio in found["control"].items()
        if part in COMPARED and not holds(ratio)
    ]
    again = sum(found["attempts"] - 1 for case in result["cases"] for found in case["sets"])
    repeated = f" ({again} of the sets' measurements were repeated)" if again else ""
    if rejected:
        return f"{text} **Rejected**: ours against ours left {low} to {high}{repeated}: {'; '.join(rejected)}."
    return f"{text} Ours against ours stayed within {low} to {high}{repeated}."


def _memory(result: dict) -> str:
    if "gpu" in result:
        return "Peak: most memory allocated by the process."
    text = "Peak: growth of the process's resident set, from before its networks are built to the second iteration"
    threshold = result["method"].get("mmap_threshold")
    if threshold is None:
        return f"{text}."
    return (
        f"{text}, in a process that is not timed and whose allocator gives freed blocks back "
        f"(MALLOC_MMAP_THRESHOLD_={threshold}): what the step needs."
    )


def _shown_parts(case: dict) -> list[str]:
    return [part for part in _PARTS if any(part in row["times"] for row in case["ways"].values())]


def _loses(row: dict, way: str) -> str:
    return " (faster than ours)" if row["ratios"][ITERATION]["high"] < 1 and way not in (OURS, SECOND) else ""


def _digits(row: dict) -> int:
    return 0 if row["times"][ITERATION]["median_ms"] >= 100 else 1


def _interval(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
