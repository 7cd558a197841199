"""Small charts as inline SVG: lines with interval bands, and intervals by row. Colours come from the page's style."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 36


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y), and with ``band`` the interval (low, high) at each of them."""

    label: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float]] | None = None


def line_chart(title: str, series: list[Series], x_label: str, y_label: str) -> str:
    """Curves over a common axis; values that are not finite are left out."""
    series = [_finite(s) for s in series]
    drawn = [s for s in series if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points] + [v for s in drawn for pair in s.band or [] for v in pair]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_of = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_open(title, WIDTH, HEIGHT)]
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(x)}</text>')
    for k, s in enumerate(drawn):
        if s.band:
            upper = [(x, high) for (x, _), (_, high) in zip(s.points, s.band, strict=True)]
            lower = [(x, low) for (x, _), (low, _) in zip(s.points, s.band, strict=True)]
            outline = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in [*upper, *reversed(lower)])
            parts.append(f'<polygon class="band c{k}" points="{outline}"/>')
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in s.points)
        parts.append(f'<polyline class="line c{k}" points="{path}"/>')
        if len(s.points) <= 12:
            parts += [f'<circle class="dot c{k}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in s.points]
    parts.append(f'<text x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="rotate(-90 12 {middle:.0f})" x="12" y="{middle:.0f}" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    parts.append("</svg>")
    legend = "".join(f'<span><i class="key c{k}"></i>{escape(s.label)}</span>' for k, s in enumerate(drawn))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{"".join(parts)}<div class="legend">{legend}</div></figure>'
    )


def interval_chart(title: str, rows: list[tuple[str, float, float | None, float | None]], x_label: str) -> str:
    """One row for each (label, value, low, high): a dot on its interval, the value beside it."""
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return ""
    step, left, right = 30, 190, 70
    width, height = 680, _TOP + step * len(rows) + _BOTTOM
    values = [v for _, value, low, high in rows for v in (value, low, high) if v is not None]
    x_ticks = ticks(min(0.0, *values), max(values))
    x_of = _scale(x_ticks[0], x_ticks[-1], left, width - right)
    bottom = _TOP + step * len(rows)
    parts = [_open(title, width, height)]
    for x in x_ticks:
        parts.append(f'<line class="grid" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 16}" text-anchor="middle">{_number(x)}</text>')
    for k, (label, value, low, high) in enumerate(rows):
        y = _TOP + step * (k + 0.5)
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line class="grid" x1="{x_of(0):.1f}" x2="{x_of(value):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if low is not None and high is not None:
            parts.append(
                f'<line class="line c0" x1="{x_of(low):.1f}" x2="{x_of(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        parts.append(f'<circle class="dot c0" cx="{x_of(value):.1f}" cy="{y:.1f}" r="5"/>')
        end = x_of(max(value, high if high is not None else value))
        parts.append(f'<text x="{end + 9:.1f}" y="{y + 4:.1f}">{value:.3f}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{"".join(parts)}</svg></figure>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _finite(series: Series) -> Series:
    keep = [k for k, (x, y) in enumerate(series.points) if math.isfinite(x) and math.isfinite(y)]
    band = None if series.band is None else [series.band[k] for k in keep]
    return Series(series.label, [series.points[k] for k in keep], band)


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _open(title: str, width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title>"
    )
