"""Reads the rows of a database that generated images, and held-out ones, have as neighbors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrodiff.databases import encode_images
from retrodiff.evaluation.sampled import Sampled
from retrodiff.evaluation.sets import ImageSet, read_database
from retrodiff.evaluation.views import Views
from retrodiff.interfaces import Encoder, Query

LARGEST = 50_000
"""Rows of a database up to which all are compared; of a larger one, those that were used."""


@dataclass(frozen=True)
class Retrieved:
    """Rows of a database that were read.

    Args:
        images: their pictures.
        rows: their numbers.
        used: of each generated image, the neighbors that conditioned it, as positions in ``rows``.
        held_out: of each held-out image, likewise; None: to be taken by features.
        whole: whether these are all rows of the database.
    """

    images: ImageSet
    rows: list[int]
    used: list[list[int]]
    held_out: list[list[int]] | None
    whole: bool

    def by_row(self) -> dict[int, int]:
        """Position of each row."""
        return {row: i for i, row in enumerate(self.rows)}


def read_retrieved(
    database: Any,
    real: ImageSet,
    sampled: Sampled,
    views: Views,
    conditioning: Encoder | None,
    size: tuple[int, int] | None,
    progress: bool,
) -> Retrieved:
    """The pictures of a database: all of them, or of a large one those that were used."""
    same = sampled.database_rows in (None, database.fingerprint.rows)
    used = [list(rows) for rows in sampled.rows] if same else []
    k = max((len(rows) for rows in used), default=0)
    held_out = None
    if k and conditioning is not None and real.image is not None:
        if problem := conditioning.fingerprint.disagreement(database.fingerprint):
            raise ValueError(f"conditioning and database disagree: {problem}")
        held_out = []
        for start in range(0, len(real), 64):
            some = [real.image(i) for i in range(start, min(start + 64, len(real)))]
            found = database.search(Query(encode_images(conditioning, some)), k)
            held_out += found.indices.tolist()
    whole = len(database) <= LARGEST
    rows = sorted({row for many in (used, held_out or []) for mine in many for row in mine})
    if whole:
        rows = list(range(len(database)))
    elif not rows:
        raise ValueError(
            f"the database has {len(database):,} rows, too many to compare all (at most "
            f"{LARGEST:,}), and the images do not say which neighbors they used: give a smaller one"
        )
    if any(row >= len(database) for mine in used for row in mine):
        raise ValueError(
            f"generation.json names rows that the database of {len(database):,} rows does not "
            "have: give the database that was sampled with"
        )
    images = read_database(
        database, views, rows=None if whole else rows, size=size, progress=progress
    )
    at = {row: i for i, row in enumerate(rows)}

    def places(many: list[list[int]]) -> list[list[int]]:
        return [[at[row] for row in mine] for mine in many]

    return Retrieved(
        images, rows, places(used), None if held_out is None else places(held_out), whole
    )
