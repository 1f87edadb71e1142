"""Draws queries beside their neighbors, with file, patch box and similarity, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retrodiff.interfaces import Neighbors, Record
from retrodiff.pictures.sheet import Line, Section, draw_sheet
from retrodiff.text import printable


def contact_sheet(
    queries: Sequence[Tensor | str],
    pictures: Sequence[Sequence[Tensor]],
    captions: Sequence[Sequence[str]],
    side: int = 128,
) -> Any:
    """One row per query: the query, and what was found for it.

    Args:
        queries: images (c, h, w) in [-1, 1], or prompts.
        pictures: for each query its neighbors' images.
        captions: for each query a text below each neighbor.
        side: of a cell, in pixels.

    Returns:
        A PIL image.
    """
    lines = [
        Line(query, near, captions=said)
        for query, near, said in zip(queries, pictures, captions, strict=True)
    ]
    return draw_sheet([Section("", lines)], side)


def captions_of(neighbors: Neighbors, side: int | None = 128) -> list[list[str]]:
    """Two short lines per neighbor: similarity and box, then file, title, label or number.

    Args:
        neighbors: with records.
        side: of a cell, in pixels; longer names are cut. None: names are whole, as in a terminal.

    Raises:
        ValueError: the neighbors have no records.
    """
    if not neighbors.records and len(neighbors.similarity):
        raise ValueError(
            "these neighbors have no records: give replace(neighbors, records=...) those of "
            "database.records(row), a tuple for each query"
        )
    return [
        [_caption(record, float(s), side) for record, s in zip(row, similarity, strict=True)]
        for row, similarity in zip(neighbors.records, neighbors.similarity, strict=True)
    ]


def _caption(record: Record | Mapping[str, Any], similarity: float, side: int | None) -> str:
    where = f"{similarity:.3f}"
    box = record.get("box")
    if box is not None and len(box) == 4:
        where += " ({},{})-({},{})".format(*box)
    file = record.get("file")
    name = printable(file or record.get("title") or record.get("label") or record.get("number", ""))
    if side is not None and len(name) > (most := side // 6):
        name = "…" + name[1 - most :] if file else name[: most - 1] + "…"
    return f"{where}\n{name}"
