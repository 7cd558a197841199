"""Bars of `adafm bench op` as SVG: how near to a copy of the same bytes each way to compute a case comes."""

from __future__ import annotations

from html import escape
from textwrap import wrap

from .baselines import AUTHORS, BROADCAST, COMPILE, COMPILE_PACKED
from .measure import COPY, OURS
from .op_table import COLUMNS, conditions

# Ways in the order of the bars, with colours that also differ in lightness.
_BARS = {
    OURS: ("ours", "#1b5e9b"),
    COMPILE_PACKED: (COLUMNS[COMPILE_PACKED], "#59a14f"),
    COMPILE: (COLUMNS[COMPILE], "#9bc98f"),
    BROADCAST: (COLUMNS[BROADCAST], "#e8a33d"),
    AUTHORS: (COLUMNS[AUTHORS], "#b8403a"),
}
_LABELS, _PANEL, _BAR, _GAP, _TOP, _MARGIN = 300, 300, 11, 12, 74, 16
_STYLE = "font-family: system-ui, sans-serif; font-size: 12px"


def chart(result: dict) -> str:
    """One panel for each number of threads, one group of bars for each row of the headline with a copy to reach for."""
    groups = _groups(result)
    width = _LABELS + len(result["runs"]) * (_PANEL + _MARGIN)
    caption = wrap(conditions(result).replace("*", "").replace("`", ""), width // 7)
    most = max(100.0, *(share for _, panels in groups for panel in panels for share in panel.values()))
    heights = [len(_ways(panels)) * _BAR + _GAP for _, panels in groups]
    bottom = _TOP + sum(heights)
    height = bottom + 30 + 16 * len(caption)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="{_STYLE}">',
        "<title>Speed of the ops in percent of a copy of the same bytes</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="20" font-weight="600">Speed in percent of a copy of the same bytes</text>',
        *_legend(groups),
    ]
    for column, run in enumerate(result["runs"]):
        left = _LABELS + column * (_PANEL + _MARGIN)
        x_of = lambda share, left=left: left + (_PANEL - 40) * share / most  # noqa: E731
        parts.append(f'<text x="{left}" y="{_TOP - 10}" font-weight="600">{escape(_panel(result, run))}</text>')
        for share in range(0, int(most) + 1, 25):
            colour = "#888888" if share == 100 else "#dddddd"
            parts.append(
                f'<line x1="{x_of(share):.1f}" x2="{x_of(share):.1f}" y1="{_TOP}" y2="{bottom}" stroke="{colour}"/>'
            )
            if share % 50 == 0:
                parts.append(f'<text x="{x_of(share):.1f}" y="{bottom + 14}" text-anchor="middle">{share} %</text>')
        y = float(_TOP)
        for (_, panels), step in zip(groups, heights, strict=True):
            for place, way in enumerate(_ways(panels)):
                if way in panels[column]:
                    parts.append(_bar(x_of, y + _GAP / 2 + place * _BAR, way, panels[column][way]))
            y += step
    y = float(_TOP)
    for (label, _), step in zip(groups, heights, strict=True):
        lines = wrap(label.replace("`", ""), 44)
        first = y + step / 2 - 7 * (len(lines) - 1) + 4
        parts += [
            f'<text x="{_LABELS - 10}" y="{first + 14 * k:.1f}" text-anchor="end">{escape(line)}</text>'
            for k, line in enumerate(lines)
        ]
        y += step
    parts += [
        f'<text x="{_MARGIN}" y="{bottom + 36 + 16 * k}" fill="#555555">{escape(line)}</text>'
        for k, line in enumerate(caption)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _groups(result: dict) -> list[tuple[str, list[dict[str, float]]]]:
    """Label, and for every run the share of a copy's speed by way."""
    runs = result["runs"]
    found = [(result["rows"][row], [run["means"][row] for run in runs]) for row in runs[0]["means"]]
    for place, case in enumerate(runs[0]["cases"]):
        if case["row"].startswith("network"):
            label = f"{case['shape']}: {result['rows'][case['row']]}"
            found.append((label, [run["cases"][place]["ratios"] for run in runs]))
    return [(label, [_shares(ratios) for ratios in panels]) for label, panels in found]


def _shares(ratios: dict[str, dict]) -> dict[str, float]:
    times = {OURS: 1.0, **{name: ratio["median"] for name, ratio in ratios.items()}}
    return {way: 100 * times[COPY] / times[way] for way in _BARS if way in times}


def _ways(panels: list[dict[str, float]]) -> list[str]:
    return [way for way in _BARS if any(way in panel for panel in panels)]


def _bar(x_of, y: float, way: str, share: float) -> str:
    name, colour = _BARS[way]
    return (
        f'<rect x="{x_of(0):.1f}" y="{y:.1f}" width="{x_of(share) - x_of(0):.1f}" height="{_BAR - 2}" fill="{colour}">'
        f"<title>{escape(name)}: {share:.0f} %</title></rect>"
        f'<text x="{x_of(share) + 4:.1f}" y="{y + _BAR - 3:.1f}" font-size="9">{share:.0f}</text>'
    )


def _legend(groups: list[tuple[str, list[dict[str, float]]]]) -> list[str]:
    shown = [way for way in _BARS if any(way in panel for _, panels in groups for panel in panels)]
    parts, x = [], _MARGIN
    for way in shown:
        name, colour = _BARS[way]
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="42">{escape(name)}</text>')
        x += 36 + 7 * len(name)
    return parts


def _panel(result: dict, run: dict) -> str:
    if run["threads"] is None:
        return result["gpu"]
    return f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
