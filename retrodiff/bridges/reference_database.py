"""A database to choose references from: its filters, its pictures, and its captions."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.databases import ArrayDatabase, Part, Searchable, import_embeddings, open_database
from retrodiff.interfaces import Database, Neighbors, Query, TextEncoder
from retrodiff.progress import progress_bar
from retrodiff.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class ReferenceDatabase:
    """A database as a component of other libraries' pipelines.

    Filters are kept once they were used, so that only the first call pays for one.

    Args:
        database: of `open_database`, or any other with pictures.
        captions: of `caption_database`; None: references are found by their pictures alone.

    Raises:
        ValueError: the database has no pictures, or the captions are of other rows.

    Examples:
        >>> import torch
        >>> from retrodiff import Fingerprint
        >>> from retrodiff.bridges import ReferenceDatabase
        >>> from retrodiff.databases import ArrayDatabase
        >>> made_by = Fingerprint(encoder="mine", weights="", preprocessing="none", dim=8)
        >>> pictures = torch.zeros(5, 3, 16, 16)
        >>> database = ArrayDatabase(torch.randn(5, 8), made_by, images=pictures)
        >>> len(ReferenceDatabase(database).database)
        5
    """

    def __init__(self, database: Database, captions: Searchable | None = None):
        if not hasattr(database, "image"):
            raise ValueError(
                f"database={type(database).__name__} has no pictures to hand over: give one of "
                "open_database"
            )
        self.database, self.captions = database, captions
        self._caption_rows: Tensor | None = None
        if captions is not None:
            if (what := captions.fingerprint.disagreement(database.fingerprint)) is not None:
                raise ValueError(f"captions and database disagree: {what}")
            rows = torch.from_numpy(captions.column("row").copy()).long()
            if len(rows) and int(rows.max()) >= len(database):
                raise ValueError(
                    f"captions are of row {int(rows.max())}, but the database has {len(database)} "
                    "rows: make them of this database, caption_database(database, encoder)"
                )
            self._caption_rows = rows
        self.filtered = lru_cache(8)(self._filtered)

    @classmethod
    def from_pretrained(cls, path: str, **where: Any) -> ReferenceDatabase:
        """Opens a database by its address, as `open_database` does.

        Args:
            path: a folder, any other address of `open_database`, or ``OWNER/NAME`` of a data set on
                the Hugging Face Hub.
            **where: ``subfolder`` and ``revision`` as diffusers hands them over; ``token``. What
                else diffusers hands to every component is left aside.
        """
        token, revision = where.get("token"), where.get("revision")
        if (subfolder := where.get("subfolder")) and ":" not in path:
            path = str(Path(path) / subfolder)
        elif _REPOSITORY.fullmatch(path) and not Path(path).exists():
            path = f"hf://datasets/{path}" + (f"@{revision}" if revision else "")
        return cls(open_database(path, token=token))

    def __len__(self) -> int:
        return len(self.database)

    def __repr__(self) -> str:
        also = "" if self.captions is None else f", {len(self.captions):,} captions"
        return f"ReferenceDatabase({self.database!r}{also})"

    def _filtered(self, where: str | None) -> View:
        """The rows that meet a condition; refused if there are none."""
        if where is None:
            return View(self.database, None, self.captions, self._caption_rows)
        if not hasattr(self.database, "where"):
            raise ValueError(
                f"where={where!r} needs a database with columns, and "
                f"{type(self.database).__name__} has none: leave it out"
            )
        found: Any = self.database.where(where)  # type: ignore[attr-defined]
        if not len(found):
            raise ValueError(
                f"where={where!r} leaves none of the {len(self.database):,} rows: loosen the filter"
            )
        rows: Tensor | None = getattr(found, "rows", None)
        if self.captions is None:
            return View(found, rows, None, None)
        if rows is None or self._caption_rows is None:
            raise ValueError(
                f"{type(self.database).__name__} filters without row numbers, which captions need: "
                "leave where or captions out"
            )
        place = torch.full((len(self.database),), -1)
        place[rows] = torch.arange(len(rows))
        kept = (place[self._caption_rows] >= 0).nonzero().flatten()
        return View(found, rows, self.captions.subset(kept), place[self._caption_rows[kept]])


class View:
    """The rows of a database that meet a filter.

    Args:
        database: those rows, numbered anew.
        rows: (m,) their numbers in the whole database; None: the same.
        captions: embeddings of captions of these rows; None: there are none.
        caption_rows: (n,) the row here that each caption is of.
    """

    def __init__(
        self,
        database: Any,
        rows: Tensor | None,
        captions: Searchable | None,
        caption_rows: Tensor | None,
    ):
        self.database, self.rows = database, rows
        self.captions, self.caption_rows = captions, caption_rows

    def __len__(self) -> int:
        return len(self.database)

    def number(self, row: int) -> int:
        """A row here -> its number in the whole database."""
        return row if self.rows is None else int(self.rows[row])

    def picture(self, row: int, name: str, strict: bool) -> tuple[Image, bool]:
        """The picture of a row, and whether it is the original; a thumbnail only with a warning."""
        from retrodiff.model.generated import to_picture

        read = getattr(self.database, "original", self.database.image)
        try:
            return to_picture(read(row)), True
        except (OSError, ValueError) as error:
            if strict:
                raise type(error)(f"strict=True takes original files only: {error}") from None
            try:
                small = to_picture(self.database.image(row))
            except (OSError, ValueError):
                raise error from None
            warnings.warn(
                f"{printable(name)}: its thumbnail of {small.width} x {small.height} pixels is the "
                f"reference, since the file cannot be read ({error})",
                stacklevel=2,
            )
            return small, False

    def size(self, row: int, strict: bool) -> tuple[int, int]:
        """Width and height of the picture that `picture` gives."""
        measure = getattr(self.database, "size", None)
        try:
            if measure is not None:
                return measure(row)
        except (OSError, ValueError):
            if strict:
                raise
        height, width = self.database.image(row).shape[-2:]
        return width, height

    def search_captions(self, query: Query, k: int) -> Neighbors:
        """The k captions nearest to each query, as rows of this database."""
        if self.captions is None or self.caption_rows is None or not len(self.captions):
            raise ValueError("no row that the filter leaves has a caption: loosen it")
        found = self.captions.search(query, min(k, len(self.captions)))
        return replace(found, indices=self.caption_rows.to(found.indices.device)[found.indices])


def caption_database(
    database: Searchable,
    encoder: TextEncoder,
    column: str = "caption",
    *,
    folder: str | Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Searchable:
    """Embeds the captions of a database's records, so that prompts find them as they find pictures.

    Args:
        database: whose records hold captions; rows without one are left out.
        encoder: the one the database was built with.
        column: where the captions are.
        folder: to be written there as a database, for `open_database`; None: in memory only.
        batch_size: captions per pass of the encoder.
        progress: show a bar.

    Returns:
        A database of captions with records ``row`` and ``caption``.

    Raises:
        ValueError: there is no such column, or no caption in it.
    """
    if column not in database.columns:
        raise ValueError(f"column={column!r} is unknown; columns: {', '.join(database.columns)}")
    values = database.table([column])[column].to_pylist()
    records = [
        {"row": row, "caption": str(value)}
        for row, value in enumerate(values)
        if value is not None and str(value).strip()
    ]
    if not records:
        raise ValueError(f"column={column!r} holds no caption in any of {len(database):,} rows")
    texts = [str(record["caption"]) for record in records]
    parts = []
    with progress_bar(len(texts), "captions", progress) as bar, torch.no_grad():
        for start in range(0, len(texts), batch_size):
            parts.append(encoder.encode_text(texts[start : start + batch_size]).float().cpu())
            bar.update(len(parts[-1]))
    embeddings = torch.cat(parts)
    fingerprint = replace(encoder.fingerprint, scale="raw")
    if folder is None:
        return ArrayDatabase(embeddings, fingerprint, records)
    part = Part(embeddings.numpy(), records, "captions")
    return import_embeddings(folder, [part], fingerprint, progress=False)
