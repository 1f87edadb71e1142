"""Base class of databases: search, filters, subsets and pictures, wherever the rows lie."""

from __future__ import annotations

import hashlib
import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.filters import parse_filter
from retrodiff.indexes import Exact, Vectors
from retrodiff.interfaces import Database, Fingerprint, Index, Neighbors, Query, Record
from retrodiff.text import printable, unescaped

_ORIENTATION = 274
"""EXIF's tag for how a camera was held."""


class Searchable(Database):
    """Rows of vectors with records, and an index over them.

    Args:
        vectors: the rows (m, d).
        fingerprint: of the encoder that made them, with the hash of the rows.
        index: searches them; None: exact.

    Raises:
        ValueError: widths of fingerprint and embeddings differ.

    Examples:
        >>> from retrodiff.databases import Searchable
        >>> from retrodiff.testing import small_database
        >>> database = small_database(rows=32)
        >>> isinstance(database, Searchable), len(database.where("label == '3'"))
        (True, 8)
    """

    def __init__(self, vectors: Vectors, fingerprint: Fingerprint, index: Index | None = None):
        if fingerprint.dim != vectors.dim:
            raise ValueError(
                f"fingerprint.dim={fingerprint.dim} does not match the embeddings' width "
                f"{vectors.dim}: give the fingerprint of the encoder that made them"
            )
        self.vectors = vectors
        self.index: Index = index or Exact().build(vectors)
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> Fingerprint:
        """Who made the embeddings, and a hash of the rows in their order."""
        return self._fingerprint

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        ...

    @abstractmethod
    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        ...

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The same as `table` in consecutive parts, so that not all are in memory at a time."""
        yield self.table(columns)

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        ...

    def original(self, index: int) -> Tensor:
        """The picture of a row from its own file, at full size: (3, h, w) in [-1, 1].

        Raises:
            FileNotFoundError: the file is not here; `image` may still have a small copy.
            ValueError: the row names no file, or one that may not be read.
        """
        return self.image(index)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of what `original` gives; the file's header is enough."""
        height, width = self.original(index).shape[-2:]
        return width, height

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} rows, {printable(self.fingerprint.encoder)})"

    def embeddings(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Row numbers (...) -> stored vectors (..., d), float32, raw scale."""
        rows = row_numbers(indices)
        found = self.vectors.rows(self.stored(self._checked(rows)))
        return found.view(*rows.shape, self.fingerprint.dim).to(rows.device)

    def search(self, query: Query, k: int) -> Neighbors:
        """The k rows of highest cosine for each query, or for each region of it.

        Raises:
            ValueError: the query has another width, or k is less than 1 or more than the rows.
        """
        embedding = query.embedding
        if embedding.shape[-1] != self.fingerprint.dim:
            raise ValueError(
                f"query.dim={embedding.shape[-1]} does not match "
                f"database.dim={self.fingerprint.dim}: ask with the encoder that the database was "
                f"built with ({self.fingerprint.encoder})"
            )
        k = neighbors_asked(k, len(self))
        shape = (*embedding.shape[:-1], k)
        if embedding.numel():
            similarity, indices = self._find(embedding.reshape(-1, embedding.shape[-1]), k)
        else:
            similarity = torch.empty(shape, device=embedding.device)
            indices = torch.empty(shape, dtype=torch.int64, device=embedding.device)
        indices = indices.view(shape)
        return Neighbors(indices, similarity.view(shape), self.embeddings(indices))

    def column(self, name: str) -> np.ndarray:
        """The values (m,) of a column.

        Raises:
            ValueError: there is no such column.
        """
        if name not in self.columns:
            raise ValueError(f"unknown column {name!r}; columns: {', '.join(self.columns)}")
        return self.table([name])[name].to_numpy()

    @property
    def labels(self) -> np.ndarray:
        """The column ``label``."""
        return self.column("label")

    def where(self, condition: str) -> Subset:
        """The rows that meet a condition on the columns.

        Args:
            condition: such as ``label == 'dog' and year > 2000`` or ``label in ['cat', 'dog']``.

        Raises:
            ValueError: the condition cannot be read, or names an unknown column.
        """
        import pyarrow as pa

        expression, names = parse_filter(condition, self.columns)
        found, start = [np.empty(0, np.int64)], 0
        for table in self.tables(names):
            numbered = table.append_column(" row", pa.array(np.arange(len(table)) + start))
            try:
                found.append(numbered.filter(expression)[" row"].to_numpy())
            except pa.ArrowException as error:
                types = ", ".join(f"{name} is {table.schema.field(name).type}" for name in names)
                raise ValueError(
                    f"filter {condition!r} does not fit its columns ({types}): compare each with "
                    f"constants of its own type [{str(error).splitlines()[0]}]"
                ) from None
            start += len(table)
        return self.subset(torch.from_numpy(np.concatenate(found)))

    def subset(self, rows: Tensor | Sequence[int]) -> Subset:
        """The given rows, numbered anew in the given order."""
        return Subset(self, row_numbers(rows))

    def stored(self, rows: Tensor) -> Tensor:
        """Row numbers (n,) here -> row numbers (n,) among the stored vectors."""
        return rows

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.index.search(queries, k)

    def _checked(self, indices: Any) -> Tensor:
        """Row numbers (...) -> the same, flat, on the CPU; refused where there is no such row."""
        flat = row_numbers(indices).reshape(-1).cpu()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(
                f"rows {int(flat.min())} to {int(flat.max())} asked of a database of "
                f"{len(self)} rows"
            )
        return flat


def neighbors_asked(k: Any, rows: int) -> int:
    """A number of neighbors as an ``int``, refused if there are not as many rows."""
    try:
        k = operator.index(k)
    except TypeError:
        raise ValueError(f"k={k!r}: give a whole number of neighbors") from None
    if k < 1:
        raise ValueError(f"k={k}: ask for at least one neighbor")
    if k > rows:
        raise ValueError(
            f"k={k} is more than the database's {rows} rows: "
            + (f"ask for at most {rows}" if rows else "there is nothing to search in it")
        )
    return k


def row_numbers(rows: Any) -> Tensor:
    """Row numbers in any form as int64 of the same shape; masks and fractions are refused."""
    given = rows.detach() if isinstance(rows, Tensor) else torch.as_tensor(np.asarray(rows))
    if not given.numel():
        return given.long()
    if given.dtype == torch.bool:
        raise ValueError(
            f"a mask of shape {tuple(given.shape)} is given where row numbers are expected: "
            "give mask.nonzero().flatten()"
        )
    if given.is_floating_point() or given.is_complex():
        raise ValueError(f"row numbers are {given.dtype}, expected whole numbers (int64)")
    return given.long()


class Subset(Searchable):
    """Chosen rows of a database, numbered anew; nothing is copied.

    Args:
        database: whose rows.
        rows: (m,) row numbers there, in the order they shall have here.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Subset
        >>> from retrodiff.testing import small_database
        >>> few = Subset(small_database(), torch.tensor([4, 7]))
        >>> len(few), few.records(torch.tensor([0]))
        (2, [{'file': '4.png', 'label': '0'}])
    """

    def __init__(self, database: Searchable, rows: Tensor):
        self.database = database
        self.rows = database._checked(rows)
        digest = hashlib.sha256(database.fingerprint.rows.encode())
        digest.update(self.rows.numpy().tobytes())
        fingerprint = replace(database.fingerprint, rows=digest.hexdigest()[:32])
        super().__init__(database.vectors.select(database.stored(self.rows)), fingerprint)

    def __reduce__(self) -> Any:
        return type(self), (self.database, self.rows)  # the vectors are those of the database

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return self.database.columns

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        return self.database.records(self.rows[self._checked(indices)])

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        return self.database.table(columns).take(self.rows.numpy())

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        return self.database.image(int(self.rows[self._checked([index])]))

    def original(self, index: int) -> Tensor:
        """The picture of a row from its own file, at full size: (3, h, w) in [-1, 1]."""
        return self.database.original(int(self.rows[self._checked([index])]))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the original."""
        return self.database.size(int(self.rows[self._checked([index])]))


def show(record: Record, root: str | Path | None, *, anywhere: bool = False) -> Tensor:
    """Reads the picture that a record refers to: (3, h, w) in [-1, 1].

    Args:
        record: of a row.
        root: folder that its file must lie in, and is relative to.
        anywhere: the record is the caller's own, so that its file may lie anywhere.
    """
    from retrodiff.databases.sources.patchify import cut_record
    from retrodiff.pictures.thumbnails import read_image, to_float

    path = _file_of(record, root, anywhere)
    try:
        return to_float(cut_record(read_image(path), record))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"the record of {printable(record['file'])} says no patch ({error!r})"
        ) from None


def measure(record: Record, root: str | Path | None) -> tuple[int, int]:
    """Width and height of the picture that a record refers to, from the file's header."""
    from PIL import Image

    path = _file_of(record, root, anywhere=False)
    try:
        if record.get("box") is not None:
            left, top, right, bottom = record["box"]
            return int(right - left), int(bottom - top)
        with Image.open(path) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = opened.size
            return (height, width) if turned else (width, height)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise ValueError(f"{printable(path)} says no size ({error!r:.200})") from None


def _file_of(record: Record, root: str | Path | None, anywhere: bool) -> Path:
    """Where the picture of a record lies; refused if that is nowhere, or not the user's."""
    file = record.get("file")
    if file is None:
        raise ValueError(
            "the row has neither a thumbnail nor a file: build the database with thumbnails=SIZE"
        )
    path = Path(str(file)) if root is None else Path(root) / str(file)
    if not anywhere and (root is None or not _is_below(path, Path(root))):
        raise ValueError(
            f"the row names the picture {printable(file)}, which the database does not hold and "
            f"which lies in no folder that you have named: open the database with root= the "
            "folder of its pictures"
        )
    if not path.is_file():  # a name that is no UTF-8 is kept with escapes
        path = Path(unescaped(str(path)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{printable(path)} is not here, and its row has no thumbnail: open the database with "
            "root= the files' folder"
        )
    return path


def _is_below(path: Path, root: Path) -> bool:
    """Whether a path leads below a folder, links aside: those in it are the user's own."""
    return ".." not in path.parts[len(root.parts) :] and path.is_relative_to(root)
