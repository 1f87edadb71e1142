"""References that were chosen for a prompt, and why just these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrodiff.databases.records import NAMES
from retrodiff.interfaces import Record
from retrodiff.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Reference:
    """One picture of a database, chosen for a prompt.

    Args:
        row: its number in the database, counted before any filter.
        similarity: cosine of the picture to the prompt, or to the nearest of its phrasings.
        record: what the database knows about it: file, license, credit, ...
        rank: its place among the rows that were looked at, from 1.
        nearest: highest cosine to a reference that was taken before it; None for the first.
        original: whether the picture is the file at full size, not a thumbnail.

    Examples:
        >>> from retrodiff.bridges import Reference
        >>> door = Reference(
        ...     row=3, similarity=0.31, record={"file": "door.png", "license": "CC0"}, rank=1
        ... )
        >>> door.name
        'door.png'
    """

    row: int
    similarity: float
    record: Record
    rank: int
    nearest: float | None = None
    original: bool = True

    @property
    def name(self) -> str:
        """File, key, id or url of the picture, or its row."""
        return name_of(self.record, self.row)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The references of one prompt.

    Args:
        prompt: what was asked.
        references: those chosen, in the order in which they were taken.
        images: their pictures, RGB.
        embeddings: (k, d), raw scale as stored.
        counts: rows of the database, rows after the filter, rows looked at.
        where: the filter, if there was one.
        left_out: why rows of higher rank than the last one chosen were left out, a line each.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> from retrodiff.bridges import Chosen, Reference
        >>> door = Reference(
        ...     row=3, similarity=0.31, record={"file": "door.png", "license": "CC0"}, rank=1
        ... )
        >>> chosen = Chosen(
        ...     "a red door", (door,), [Image.new("RGB", (64, 64))], torch.ones(1, 8), (9, 9, 5)
        ... )
        >>> print(chosen.explain())
        'a red door': 1 of 9 rows; the 5 nearest were looked at
        1. door.png: similarity 0.310, rank 1
        >>> chosen.credit()
        [{'row': 3, 'similarity': 0.31, 'record': {'file': 'door.png', 'license': 'CC0'}}]
    """

    prompt: str
    references: tuple[Reference, ...]
    images: list[Image] = field(repr=False)
    embeddings: Tensor = field(repr=False)
    counts: tuple[int, int, int]
    where: str | None = None
    left_out: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.references)

    def explain(self) -> str:
        """Why these references, in lines to be printed."""
        total, kept, seen = self.counts
        filtered = "" if self.where is None else f"; {self.where}: {kept:,} rows"
        lines = [
            f"{printable(self.prompt)!r}: {len(self)} of {total:,} rows{filtered}; the "
            f"{seen:,} nearest were looked at"
        ]
        for i, one in enumerate(self.references, 1):
            parts = [f"similarity {one.similarity:.3f}", f"rank {one.rank}"]
            if one.nearest is not None:
                parts.append(f"{one.nearest:.2f} to the nearest reference above")
            if not one.original:
                parts.append("thumbnail")
            lines.append(f"{i}. {printable(one.name)}: {', '.join(parts)}")
        return "\n".join([*lines, *(f"- {line}" for line in self.left_out)])

    def credit(self) -> list[dict[str, Any]]:
        """Row, similarity and record of each reference, as a picture made from them carries it."""
        return [
            {"row": one.row, "similarity": one.similarity, "record": dict(one.record)}
            for one in self.references
        ]


def name_of(record: Record, row: int) -> str:
    """What a row is called: its file, key, id or url, or its number."""
    return str(next((record[n] for n in NAMES if record.get(n) is not None), f"row {row}"))
