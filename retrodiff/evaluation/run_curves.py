"""Loss curves of a training run, read from its ``metrics.csv`` and drawn as SVG."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

FILE = "metrics.csv"
LARGEST = 64 * 2**20
"""Bytes of a file that are read at most."""

COLORS = ("#0f766e", "#d97706")


@dataclass(frozen=True)
class Curve:
    """A number over the steps of a training.

    Args:
        name: what it is.
        points: (step, value), by step.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def read_curves(run: str | Path) -> list[Curve]:
    """Training and validation loss of a run.

    Args:
        run: the folder of a training with ``metrics.csv``, or such a file: columns ``step``,
            ``loss`` and, where there is one, ``validation``; others are left alone, empty fields
            are gaps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table.
    """
    file = Path(run).expanduser()
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no {FILE}: give the folder of a training run")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} is larger than {LARGEST >> 20} MiB: no table of a training")
    points: dict[str, list[tuple[float, float]]] = {"loss": [], "validation": []}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines)
            names = table.fieldnames or ()
            if "step" not in names or not points.keys() & set(names):
                raise ValueError("it has no columns step and loss")
            for row in table:
                for name, found in points.items():
                    if row.get(name) and row["step"]:
                        value = float(row[name]), float(row["step"])
                        if all(map(math.isfinite, value)):
                            found.append((value[1], value[0]))
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table of a training: {error}") from None
    words = {"loss": "training loss", "validation": "validation loss"}
    return [Curve(words[k], tuple(sorted(v))) for k, v in points.items() if v]


def draw(curves: Sequence[Curve], width: int = 760, height: int = 260) -> str:
    """An SVG of curves over one axis of steps; the loss is drawn to the logarithm if it can be.

    The training loss is averaged over neighboring steps where there are more than pixels.
    """
    left, right, top, bottom = 56, 16, 12, 34
    curves = [_thinned(c, 240) for c in curves]
    steps = [x for c in curves for x, _ in c.points]
    values = [y for c in curves for _, y in c.points]
    low, high, logarithmic = min(values), max(values), min(values) > 0
    scale = math.log10 if logarithmic else float
    a, b = scale(low), scale(high)
    a, b = (a - 0.5, b + 0.5) if b - a < 1e-9 else (a - 0.05 * (b - a), b + 0.05 * (b - a))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (b - scale(value)) / (b - a)

    parts: list[str] = []
    for i in range(4):
        level = a + (b - a) * (i + 0.5) / 4
        value = 10**level if logarithmic else level
        at = f"{y(value):.1f}"
        parts.append(f"<line class=grid x1={left} x2={width - right} y1={at} y2={at} />")
        parts.append(f'<text x={left - 8} y={at} dy=".35em" text-anchor=end>{value:.3g}</text>')
    for i in range(5):
        step = first + (last - first) * i / 4
        anchor = ("start", "middle", "middle", "middle", "end")[i]
        parts.append(
            f'<text x="{x(step):.1f}" y={height - 12} text-anchor={anchor}>{step:,.0f}</text>'
        )
    for curve, color in zip(curves, COLORS, strict=False):
        line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in curve.points)
        parts.append(f'<polyline fill=none stroke="{color}" stroke-width=2 points="{line}" />')
        if len(curve.points) == 1:
            [(s, v)] = curve.points
            parts.append(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r=4 fill="{color}" />')
    for i, (curve, color) in enumerate(zip(curves, COLORS, strict=False)):
        at = top + 8 + 18 * i
        parts.append(f'<rect x={width - 170} y={at - 5} width=18 height=3 fill="{color}" />')
        last_value = curve.points[-1][1]
        parts.append(f"<text x={width - 146} y={at}>{curve.name} {last_value:.3g}</text>")
    label = ", ".join(c.name for c in curves)
    return (
        f'<svg class=curves viewBox="0 0 {width} {height}" role=img aria-label="{label} over steps"'
        f">{''.join(parts)}</svg>"
    )


def _thinned(curve: Curve, most: int) -> Curve:
    n = len(curve.points)
    if n <= most:
        return curve
    cuts = [round(i * n / most) for i in range(most + 1)]
    parts = [curve.points[i:j] for i, j in pairwise(cuts)]
    mean = [tuple(sum(v) / len(part) for v in zip(*part, strict=True)) for part in parts]
    return Curve(curve.name, tuple((s, v) for s, v in mean))
