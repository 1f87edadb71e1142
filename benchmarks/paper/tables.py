"""The numbers of a study as rows: of its points, each with the line and the place that it is at."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from points import Points
from studies import Study

from retrodiff.disk.files import atomic_write

FIRST = (
    "line", "at", "training", "seed", "steps", "seconds", "parameters", "k", "database", "rows",
    "proposal", "guidance", "n", "reference", "reference_n", "fid", "fid_error", "precision",
    "precision_error", "recall", "recall_error", "kid", "kid_deviation", "mind", "density",
    "coverage",
)  # fmt: skip
"""Columns that come first, in this order."""

LEFT_OUT = ("part", "copies", "classes")


def rows_of(study: Study, points: Points) -> list[dict[str, Any]]:
    """A row for each point that was measured."""
    found: list[dict[str, Any]] = []
    for line in study.lines:
        for at, seeds in zip(line.at, line.points, strict=True):
            for point in seeds:
                if (numbers := points.numbers(point)) is not None:
                    name = "" if at is None else str(at).replace("\n", " ")
                    found.append({"line": line.label, "at": name, **numbers})
    for point in study.anchors:
        if (numbers := points.numbers(point)) is not None:
            found.append({"line": "anchor", "at": point.training, **numbers})
    return found


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a csv; nothing where there are none."""
    if not rows:
        return
    names = dict.fromkeys(name for row in rows for name in row if name not in LEFT_OUT)
    columns = [name for name in FIRST if name in names]
    columns += [name for name in names if name not in columns]
    with atomic_write(file) as partial, partial.open("w", newline="") as text:
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> list[dict[str, Any]]:
    """Rows of a csv; numbers as numbers, what is empty left out."""
    if not file.exists():
        return []
    with file.open(newline="") as text:
        return [{k: _value(v) for k, v in row.items() if v} for row in csv.DictReader(text)]


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
