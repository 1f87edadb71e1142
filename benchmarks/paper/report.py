"""Writes the tables of docs/findings.md from the csv files, between the marks of each study."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import error_of
from studies import Study
from tables import read_csv

from retrodiff.disk.files import atomic_write

Rows = Sequence[Mapping[str, Any]]
NOTHING = "Not measured yet."


def write_tables(page: Path, studies: Sequence[Study], tables: Path, pictures: Path) -> None:
    """Replaces what stands between ``<!-- study:a -->`` and ``<!-- /study -->``, and so on.

    Args:
        page: Markdown.
        studies: whose tables are written.
        tables: where the csv files are.
        pictures: where the plots are, in a folder beside the page; those that are there are shown.
    """
    text = page.read_text("utf-8")
    for study in studies:
        rows = read_csv(tables / f"{study.name}.csv")
        made = _digits(rows) if study.digits else _table(study, rows)
        picture = pictures / f"{study.name}.png"
        if rows and picture.exists():
            made = f"![{study.title}]({picture.relative_to(page.parent).as_posix()})\n\n{made}"
        marks = re.compile(rf"(<!-- study:{study.letter} -->\n).*?(<!-- /study -->)", re.DOTALL)
        text = marks.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    with atomic_write(page) as partial:
        partial.write_text(text, "utf-8")


def _table(study: Study, rows: Rows) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_name(row), []).append(row)
    if not groups:
        return NOTHING
    columns = [c for c in study.columns if any(c[0] in row for row in rows)]
    lines = _head(["", "trainings", *(title for _, title in columns)])
    for name, own in groups.items():
        cells = [_value(column, [r for r in own if column in r]) for column, _ in columns]
        lines.append(_row([name, str(len(own)), *cells]))
    n, against = (_span(rows, column) for column in ("n", "reference_n"))
    return "\n".join([*lines, "", f"{n} samples against {against} held-out photographs per point."])


def _digits(rows: Rows) -> str:
    if not rows:
        return NOTHING
    modes = list(dict.fromkeys(str(row["at"]) for row in rows))
    lines = _head(["", "trainings", *modes])
    for name in dict.fromkeys(str(row["line"]) for row in rows):
        own = [row for row in rows if row["line"] == name]
        cells = [_value("share", [r for r in own if r["at"] == mode]) for mode in modes]
        seeds = len({row["seed"] for row in own})
        lines.append(_row([f"{name} (n = {_span(own, 'n')})", str(seeds), *cells]))
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    """Line and place, or how far a training was."""
    if row["line"] == "anchor":
        return str(row["at"])
    place = row.get("at")
    if isinstance(place, float):
        place = f"{place:g}"
    if not place and "steps" in row:
        place = f"{row['steps']:,.0f} steps"
        if "parameters" in row:
            place += f", {row['parameters'] / 1e6:.2f}M"
    return f"{row['line']}, {place}" if place else str(row["line"])


def _value(column: str, rows: Rows) -> str:
    if not rows:
        return ""
    mean, error = statistics.fmean(float(r[column]) for r in rows), error_of(column, rows)
    shown, spread = (
        f"{x:,.0f}" if mean >= 100 else f"{x:.{n}g}" for x, n in ((mean, 3), (error, 2))
    )
    return f"{shown} ± {spread}" if error else shown


def _span(rows: Rows, column: str) -> str:
    return " or ".join(f"{n:,}" for n in sorted({int(row[column]) for row in rows}))


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|".join(["", *("---" for _ in cells), ""])]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
