"""Line charts as SVG text: a few shapes that a browser scales, with colours that the page's style sheet gives."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

Points = Sequence[Sequence[float]]

#: The drawing's own units; the page scales it to the column's width.
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40

#: A line has at most so many points; of more, groups are replaced by their means.
MOST_POINTS = 320


def line_chart(curve: Mapping[str, Any]) -> Markup:
    """A chart of lines over a common pair of axes.

    Args:
        curve: {"title", "x", "y", "lines": [{"name", "points", "style"}]} as in a report's `curves`. Style "faint" is a
            thin line in the background, "dots" a line with its points marked, each with its value on hovering. With
            "from_zero" the upright axis begins there.

    Returns:
        One `<svg>`; without points, an empty text.
    """
    lines = [(line, _finite(line["points"])) for line in curve["lines"]]
    every = [point for _, points in lines for point in points]
    if not every:
        return Markup("")
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks, y_ticks = (
        ticks(min(xs), max(xs), 6),
        ticks(min([0.0, *ys]) if curve.get("from_zero") else min(ys), max(ys), 5),
    )
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    shapes = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve["title"])}">',
        *(_y_tick(tick, place(x_low, tick)[1]) for tick in y_ticks),
        *(_x_tick(tick, place(tick, y_low)[0]) for tick in x_ticks if x_low <= tick <= x_high),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(curve["x"])}</text>',
    ]
    for number, (line, points) in enumerate(lines):
        style = f"line-{number} {line.get('style', 'line')}"
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in thinned(points)))
        shapes.append(f'<polyline class="{style}" points="{path}"/>')
        if line.get("style") == "dots":
            shapes += [
                _dot(style, place(*point), f"{line['name']}, {curve['x']} {point[0]:g}: {point[1]:.4g}")
                for point in points
            ]
    return Markup("\n".join([*shapes, "</svg>"]))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, about so many, from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: means of neighbours where there are more."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]


def smoothed(points: Points, reach: int) -> Points:
    """The points, each at the mean height of itself and up to `reach` neighbours on either side, as many on both."""
    heights, smooth = [y for _, y in points], []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        smooth.append([x, sum(heights[i - near : i + near + 1]) / (2 * near + 1)])
    return smooth


def _finite(points: Points) -> Points:
    return [point for point in points if all(math.isfinite(value) for value in point)]


def _y_tick(value: float, y: float) -> str:
    text = f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{_short(value)}</text>'
    return f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>{text}'


def _x_tick(value: float, x: float) -> str:
    return f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>'


def _dot(style: str, place: tuple[float, float], text: str) -> str:
    return f'<circle class="{style}" cx="{place[0]}" cy="{place[1]}" r="3.5"><title>{escape(text)}</title></circle>'


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,g}"
