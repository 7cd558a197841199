"""A study's findings as a Markdown table and as charts that stand by themselves."""

from __future__ import annotations

import re
from html import escape

from ..report.charts import WIDTH, Series, interval_chart, line_chart

_COLOURS = ("#1769c4", "#c4551a", "#22894e", "#8a3fb0")
_STYLE = (
    "text { font: 11px system-ui, sans-serif; fill: #444b52; } .grid { stroke: #d9dee3; } "
    ".line { fill: none; stroke-width: 2; } .band { opacity: .18; } "
    + " ".join(f".line.c{k} {{ stroke: {c}; }} .dot.c{k}, .band.c{k} {{ fill: {c}; }}" for k, c in enumerate(_COLOURS))
)
_COUNTED = ("count", "steps")
_VERDICTS = {True: "holds", False: "**does not hold**", None: "reported"}


def markdown(study: dict) -> str:
    """The tables of a study's result (what ``results.json`` holds), one for each finding."""
    lines = [study["conditions"], ""]
    for finding in study["findings"]:
        verdict = ("asserted, " if finding["asserted"] else "") + _VERDICTS[finding["holds"]]
        lines += [f"**{finding['claim']}** ({verdict})", ""]
        lines += ["| setting | quantity | mean [95 %] | median | seeds |", "|---|---|---|---|---|"]
        lines += [_row(row) for row in finding["rows"]]
        lines += ["", *(f"{note}." for note in finding["notes"]), ""]
    lines += [f"Not done: {text}." for text in study["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def charts(study: dict) -> dict[str, str]:
    """SVG by file name: the courses and, for each finding, the intervals of every quantity that differs."""
    drawn: dict[str, str] = {}
    for number, finding in enumerate(study["findings"]):
        for quantity in dict.fromkeys(row["quantity"] for row in finding["rows"]):
            rows = [
                row for row in finding["rows"] if row["quantity"] == quantity and row["numbers"]["mean"] is not None
            ]
            bars = [(r["label"], r["numbers"]["mean"], r["numbers"]["low"], r["numbers"]["high"]) for r in rows]
            if len({bar[1:] for bar in bars}) > 1 and quantity != "count":
                name = f"{finding['part']}-{number:02d}-{_plain(quantity)}.svg"
                drawn[name] = _alone(interval_chart(finding["claim"], bars, quantity), finding["claim"], ())
        if finding["curves"]:
            curves = [_series(label, rows) for label, rows in finding["curves"].items()]
            title = f"{finding['claim']}; mean, range"
            figure = line_chart(title, curves, "step", finding["course"])
            drawn[f"{finding['part']}-{number:02d}-course.svg"] = _alone(figure, title, [s.label for s in curves])
    return drawn


def _row(row: dict) -> str:
    numbers, counted = row["numbers"], row["quantity"] in _COUNTED
    seeds = ", ".join("-" if value is None else _number(value, counted) for value in numbers["values"])
    if numbers["mean"] is None:
        return f"| {row['label']} | {row['quantity']} | - | - | {seeds} |"
    mean, median = (_number(numbers[name], counted) for name in ("mean", "median"))
    if numbers["low"] is not None:
        mean += " [" + ", ".join(_number(numbers[name], counted) for name in ("low", "high")) + "]"
    return f"| {row['label']} | {row['quantity']} | {mean} | {median} | {seeds} |"


def _number(value: float, counted: bool) -> str:
    """Whole, or with three decimals; with three digits where those would be zeros."""
    if counted:
        return f"{value:.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _series(label: str, rows: list[dict]) -> Series:
    kept = [row for row in rows if row["mean"] is not None]
    found = [[value for value in row["values"] if value is not None] for row in kept]
    points = [(row["step"], row["mean"]) for row in kept]
    return Series(label, points, [(min(values), max(values)) for values in found])


def _alone(figure: str, title: str, legend: list[str] | tuple[str, ...]) -> str:
    """The drawing of a report's figure with its own colours, ground, title and legend."""
    drawing = re.search(r'<svg [^>]*viewBox="0 0 (\d+) (\d+)"[^>]*>(.*)</svg>', figure, re.DOTALL)
    if drawing is None:
        raise ValueError(f"no drawing in the figure of {title!r}")
    width, height, content = int(drawing[1]), int(drawing[2]), drawing[3]
    keys = []
    for k, label in enumerate(legend):
        x = 56 + k * (WIDTH - 70) // len(legend)
        keys.append(f'<rect x="{x}" y="{height + 8}" width="12" height="4" fill="{_COLOURS[k % len(_COLOURS)]}"/>')
        keys.append(f'<text x="{x + 17}" y="{height + 14}">{escape(label)}</text>')
    below = height + (24 if legend else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {width} {below + 24}" role="img">'
        f"<style>{_STYLE}</style>"
        f'<rect y="-24" width="{width}" height="{below + 24}" fill="#ffffff"/>'
        f'<text x="8" y="-8" font-weight="600">{escape(title)}</text>{content}{"".join(keys)}</svg>\n'
    )


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.partition("[")[0].lower()).strip("-")
