"""Draws curves as a picture, with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FINE = 2
"""The picture is drawn this much larger, then reduced, so that lines are smooth."""
WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 34, 40


@dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Args:
        name: in the legend.
        points: (x, y), x ascending; points that are not finite are left out.
        color: such as ``#1f77b4``.
        marked: draw a dot at each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves on common axes.

    Args:
        title: above.
        curves: at least one; the first is drawn first.
        x: name of the horizontal axis.
        mark: x of a dashed vertical line; None: there is none.
        ends: of the horizontal axis; None: those of the curves.
    """

    title: str
    curves: Sequence[Curve]
    x: str = "step"
    mark: float | None = None
    ends: tuple[float, float] | None = None


def draw_curves(panels: Sequence[Panel]) -> Image:
    """Panels below each other; a value axis is logarithmic where values differ fivefold.

    Args:
        panels: those without a finite point are left out.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw

    panels = [panel for panel in panels if any(_finite(curve) for curve in panel.curves)]
    size = (WIDTH * FINE, HEIGHT * FINE * max(1, len(panels)))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, panel in enumerate(panels):
        _draw_panel(draw, panel, i * HEIGHT)
    return picture.resize((WIDTH, size[1] // FINE), Image.Resampling.LANCZOS)


def _draw_panel(draw: Any, panel: Panel, top: int) -> None:
    from PIL import ImageFont

    font, bold = ImageFont.load_default(size=11 * FINE), ImageFont.load_default(size=14 * FINE)
    curves = [(curve, points) for curve in panel.curves if (points := _finite(curve))]
    xs = [x for _, points in curves for x, _ in points]
    ys = sorted(y for _, points in curves for _, y in points)
    low, high = ys[0], ys[-1]
    logarithmic = low > 0 and high / low > 5
    to = math.log10 if logarithmic else float
    bottom, ceiling = to(low), to(high)
    margin = (ceiling - bottom) * 0.06 or abs(ceiling) * 0.1 or 1.0
    bottom, ceiling = bottom - margin, ceiling + margin
    left, right = panel.ends or (min(xs), max(xs))
    right = right if right > left else left + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        up = (to(y) - bottom) / (ceiling - bottom) * (HEIGHT - TOP - BOTTOM)
        return (LEFT + across) * FINE, (top + HEIGHT - BOTTOM - up) * FINE

    box = (LEFT, top + TOP, WIDTH - RIGHT, top + HEIGHT - BOTTOM)
    for value in _ticks(low, high, logarithmic):
        _, y = at(left, value)
        draw.line((box[0] * FINE, y, box[2] * FINE, y), "#e6e6e6", FINE)
        draw.text((box[0] * FINE - 6 * FINE, y), f"{value:.4g}", "#444444", font, "rm")
    for value in _ticks(left, right, False):
        x, _ = at(value, low)
        draw.line((x, box[3] * FINE, x, box[3] * FINE + 4 * FINE), "#888888", FINE)
        draw.text((x, box[3] * FINE + 6 * FINE), f"{value:,.10g}", "#444444", font, "mt")
    draw.rectangle([edge * FINE for edge in box], outline="#888888", width=FINE)
    draw.text((LEFT * FINE, (top + 10) * FINE), panel.title, "black", bold)
    middle = (LEFT + WIDTH - RIGHT) / 2
    draw.text((middle * FINE, (top + HEIGHT - 14) * FINE), panel.x, "#444444", font, "mm")
    if panel.mark is not None and left <= panel.mark <= right:
        x, _ = at(panel.mark, low)
        for y in range(box[1], box[3], 6):
            draw.line((x, y * FINE, x, (y + 3) * FINE), "#888888", FINE)
    for row, (curve, points) in enumerate(curves):
        places = [at(x, y) for x, y in points]
        if len(places) > 1:
            draw.line(places, curve.color, 2 * FINE, joint="curve")
        if curve.marked or len(places) == 1:
            for x, y in places:
                r = 3 * FINE
                draw.ellipse((x - r, y - r, x + r, y + r), curve.color)
        y = (top + TOP + 8 + 17 * row) * FINE
        start = (WIDTH - RIGHT + 12) * FINE
        draw.line((start, y, start + 16 * FINE, y), curve.color, 3 * FINE)
        draw.text((start + 22 * FINE, y), curve.name, "black", font, "lm")


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """A few round numbers in [low, high]; the ends themselves, if there are no two."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    else:
        rough = (high - low) / 5 or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        found = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) > 1 else [low, high] if high > low else [low]
