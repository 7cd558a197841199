"""Bars of `adafm bench step` as SVG: what an iteration of each configuration takes, and of what it is made."""

from __future__ import annotations

from html import escape
from textwrap import wrap

from .step_child import G_STEP
from .step_rounds import ITERATION
from .step_table import conditions

# Parts of an iteration from the left, with colours that also differ in lightness.
_PARTS = (("generator step and average", "#1b5e9b"), ("discriminator step", "#9bc98f"))
_LABELS, _PANEL, _NUMBERS, _BAR, _HEAD, _TOP, _MARGIN = 190, 420, 170, 18, 34, 56, 16
_STYLE = "font-family: system-ui, sans-serif; font-size: 12px"


def chart(result: dict) -> str:
    """One group of bars for each case, as long as the slowest configuration; beside each its time over ours."""
    width = _LABELS + _PANEL + _NUMBERS
    caption = wrap(conditions(result).replace("*", "").replace("`", ""), width // 7)
    bottom = _TOP + sum(_HEAD + _BAR * len(case["ways"]) for case in result["cases"])
    height = bottom + 24 + 16 * len(caption)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="{_STYLE}">',
        "<title>Time of a training iteration</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="20" font-weight="600">Time of a training iteration</text>',
        *_legend(),
    ]
    y = _TOP
    for case in result["cases"]:
        parts += _case(case, y)
        y += _HEAD + _BAR * len(case["ways"])
    parts += [
        f'<text x="{_MARGIN}" y="{bottom + 24 + 16 * k}" fill="#555555">{escape(line)}</text>'
        for k, line in enumerate(caption)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _case(case: dict, top: float) -> list[str]:
    most = max(row["times"][ITERATION]["median_ms"] for row in case["ways"].values())
    title = f"{case['title']}, batch {case['batch']}"
    parts = [f'<text x="{_MARGIN}" y="{top + 22}" font-weight="600">{escape(title)}</text>']
    for place, (way, row) in enumerate(case["ways"].items()):
        y = top + _HEAD + place * _BAR
        whole = row["times"][ITERATION]["median_ms"]
        first = min(row["times"][G_STEP]["median_ms"], whole)
        parts.append(f'<text x="{_LABELS - 8}" y="{y + 12}" text-anchor="end">{escape(way)}</text>')
        left = float(_LABELS)
        for (name, colour), milliseconds in zip(_PARTS, (first, whole - first), strict=True):
            length = _PANEL * milliseconds / most
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="{_BAR - 4}" fill="{colour}">'
                f"<title>{escape(way)}, {escape(name)}: {milliseconds:.1f} ms</title></rect>"
            )
            left += length
        ratio = f", {row['ratios'][ITERATION]['median']:.2f} of ours" if "ratios" in row else ""
        parts.append(f'<text x="{left + 6:.1f}" y="{y + 12}">{_duration(whole)}{ratio}</text>')
    return parts


def _duration(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def _legend() -> list[str]:
    parts, x = [], _MARGIN
    for name, colour in _PARTS:
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="42">{escape(name)}</text>')
        x += 36 + 7 * len(name)
    return parts
