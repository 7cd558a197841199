"""Markdown tables of `adafm bench op`: the headline, every case, and the conditions."""

from __future__ import annotations

from .baselines import AUTHORS, BROADCAST, COMPILE, COMPILE_PACKED
from .measure import COPY, OURS, SECOND

NOT_YET = "not measured on a GPU yet"
# Columns of the headline: time over ours of what users write; time of a copy of as many bytes over ours, in percent.
COLUMNS = {
    AUTHORS: "authors' expression",
    BROADCAST: "broadcasting",
    COMPILE: "torch.compile",
    COMPILE_PACKED: "torch.compile, weight prepacked",
    COPY: "share of a copy's speed",
}


def table(result: dict) -> str:
    """The headline, the conditions, and every case."""
    return f"{summary(result)}\n\n{details(result)}"


def summary(result: dict) -> str:
    """The headline and the conditions."""
    return f"{headline(result)}\n\n{conditions(result)}"


def headline(result: dict) -> str:
    """Geometric means over the filters, whole networks, and what a call costs on a tiny layer."""
    runs = result["runs"]
    means = sorted(
        {case["shape"]: case["bytes"] for case in runs[0]["cases"] if case["mean"]}.items(), key=lambda c: c[1]
    )
    lines = [
        f"Time over ours{_unit(runs)}. First geometric means over filters {', '.join(shape for shape, _ in means)}; "
        "then all modulated layers of a network; last a single small layer.",
        "",
        f"| | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in runs[0]["means"]:
        lines.append(_headline_row(result["rows"][row], [run["means"][row] for run in runs]))
    for case in runs[0]["cases"]:
        if case["row"].startswith(("network", "tiny")):
            title = f"{case['shape']}: {result['rows'][case['row']]}"
            lines.append(_headline_row(title, [_same(run, case)["ratios"] for run in runs]))
    return "\n".join(lines)


def conditions(result: dict) -> str:
    """Machine, versions and commit in one paragraph, and which cases the control rejected."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    machine = result.get("gpu") or f"{result['cpu']}, {result['cpus']} CPUs, {result['cpu_level']}"
    if "gpu" in result:
        machine += f", driver {result['driver']}"
    state = {True: " with uncommitted changes", False: "", None: ""}[result["dirty"]]
    text = (
        f"{machine}; {versions}; commit {result['commit']}{state}; at most {result['method']['rounds']} paired rounds "
        f"a case; `{result['command']}`."
    )
    if reasons := sorted({run["compile"]["left_out"] for run in result["runs"] if run["compile"]["left_out"]}):
        text += f" torch.compile was left out where nothing stands under it: {'; '.join(reasons)}."
    if not all(run["complete"] for run in result["runs"]):
        text += " Stopped at its time limit, so cases are missing."
    rejected = [
        f"{case['row']} {case['shape']}{_where(run)}, {case['ratios'][SECOND]['median']:.3f}"
        for run in result["runs"]
        for case in run["cases"]
        if not case["accepted"]
    ]
    low, high = result["method"]["control"]
    if rejected:
        listed = "; ".join(rejected[:3]) + ("; ..." if len(rejected) > 3 else "")
        return f"{text} **Rejected**: ours against ours left {low} to {high} in {len(rejected)} cases: {listed}."
    return f"{text} Ours against ours stayed within {low} to {high} in every case."


def details(result: dict) -> str:
    """Every case of every run: times, bandwidth, and all ratios with their 95 % intervals."""
    return "\n\n".join(_details(result, run) for run in result["runs"])


def _details(result: dict, run: dict) -> str:
    on_gpu = result["device"] == "cuda"
    times = "kernel us | call us (p20 to p80) | enqueue us" if on_gpu else "us (p20 to p80) | processor us"
    share = "kernel time of a copy / ours" if on_gpu else "copy / ours"
    lines = [
        f"Every case{_where(run)}; x: time / ours (95 %).",
        "",
        f"| case | filter | {times} | GB/s | {share} | others |",
        "|---" * (8 if on_gpu else 7) + "|",
    ]
    for case in run["cases"]:
        ours = case["methods"][OURS]
        call = f"{ours['median_us']:.1f} ({ours['p20_us']:.1f} to {ours['p80_us']:.1f})"
        if on_gpu:
            kernel = case["kernel_us"]
            cells = [f"{kernel[OURS]:.2f}", call, f"{ours['cpu_us']:.1f}", f"{case['bytes'] / kernel[OURS] / 1e3:.0f}"]
            cells.append(f"{kernel[COPY] / kernel[OURS]:.2f}")
        else:
            cells = [call, f"{ours['cpu_us']:.1f}", f"{case['gbytes_per_second']:.1f}", _interval(case["ratios"][COPY])]
        others = [
            f"{name} {_interval(ratio)}{' (faster than ours)' if ratio['median'] < 1 else ''}"
            for name, ratio in case["ratios"].items()
            if name not in (COPY, SECOND)
        ]
        if not case["accepted"]:
            others.append(f"**rejected**, control {case['ratios'][SECOND]['median']:.3f}")
        title = result["rows"][case["row"]]
        lines.append(f"| {title} | {case['shape']} | {' | '.join(cells)} | {'; '.join(others)} |")
    return "\n".join(lines)


def _headline_row(title: str, ratios: list[dict]) -> str:
    cells = [[_cell(found.get(name), name == COPY) for found in ratios] for name in COLUMNS]
    return f"| {title} | {' | '.join(' / '.join(cell) if any(cell) else '' for cell in cells)} |"


def _cell(ratio: dict | None, copy: bool) -> str:
    if ratio is None:
        return ""
    if copy:
        return f"{100 * ratio['median']:.0f} %"
    value = f"{ratio['median']:.2f}" if ratio["median"] < 9.95 else f"{ratio['median']:.1f}"
    return f"**{value}** (we lose)" if ratio["median"] < 1 else value


def _interval(ratio: dict) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _same(run: dict, case: dict) -> dict:
    return next(other for other in run["cases"] if (other["row"], other["shape"]) == (case["row"], case["shape"]))


def _where(run: dict) -> str:
    return "" if run["threads"] is None else f", {run['threads']} thread{'s' * (run['threads'] > 1)}"


def _unit(runs: list[dict]) -> str:
    if runs[0]["threads"] is None:
        return ""
    counts = " / ".join(str(run["threads"]) for run in runs)
    return f", with {counts} thread{'s' * (counts != '1')}"
