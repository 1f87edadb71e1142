"""A LanceDB table as a database: on a local disk or in object storage, filtered by SQL.

Search, filters and storage are LanceDB's own (extra ``retrodiff[lance]``); what is added here is
the `Database` protocol, and the exact cosine of what was found. Without a vector index of the table
the search is exact. The table is read at one version, so a database does not change under its
reader.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.marks import agreed, mark_of, marked
from retrodiff.databases.searchable import Searchable, show
from retrodiff.databases.sql import joined
from retrodiff.databases.storable import storable
from retrodiff.indexes.vectors import GatheredVectors, check_search
from retrodiff.interfaces import Fingerprint, Index, Record
from retrodiff.text import printable

_SPARE = 8  # found beyond k, since LanceDB rounds queries to the type of the column
_QUERIES = 256  # searched at a time
_ROWS = 8192  # written at a time


class LanceDatabase(Searchable):
    """The rows of a LanceDB table; make one with `open` or `create`.

    Row numbers count the table's rows in the order of LanceDB's own row ids. ``fingerprint.rows``
    tells tables apart by their row ids and by the rows that `create` copied; of a table made
    elsewhere, by its address, name and version: its contents are not compared.

    Args:
        table: an open LanceDB table.
        vector: its column of embeddings, a fixed-size list of floats.
        fingerprint: of the encoder that made them; None: the one that `create` wrote.
        condition: SQL that rows must meet, or several such; None: all rows.
        root: folder that the records' files are relative to.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.databases import LanceDatabase
        >>> from retrodiff.testing import small_database
        >>> table = LanceDatabase.create("lance", "rows", small_database())
        >>> table.where("label = '3'").search(Query(torch.randn(1, 8)), k=2).indices.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        table: Any,
        *,
        vector: str = "vector",
        fingerprint: Fingerprint | None = None,
        condition: str | Sequence[str] | None = None,
        root: str | Path | None = None,
    ):
        conditions = (condition,) if isinstance(condition, str) else tuple(condition or ())
        self._rows = _Rows(table, vector, conditions)
        self.root = root
        name = f"the table {table.name!r}"
        written = mark_of(table.schema, name)
        mark = self._given = agreed(fingerprint, written, name)
        digest = hashlib.sha256((written.rows if written else _place(table)).encode())
        digest.update(self._rows.ids.numpy().tobytes())
        vectors = _LanceVectors(self._rows)
        super().__init__(
            vectors, replace(mark, rows=digest.hexdigest()[:32]), _LanceIndex(self._rows)
        )

    def __reduce__(self) -> Any:
        """Another process, such as a worker of a ``DataLoader``, opens the same version again.

        What is sent to it holds the options of the object storage, keys included.
        """
        table, rows = self._rows.table, self._rows
        about = {
            "uri": str(table._conn.uri),
            "table": table.name,
            "vector": rows.vector,
            "fingerprint": self._given,
            "root": self.root,
            "version": table.version,
            "storage_options": getattr(table._conn, "storage_options", None),
        }
        return _opened_again, (about, rows.conditions, self.fingerprint.rows)

    @classmethod
    def open(
        cls,
        uri: str | Path,
        table: str,
        *,
        vector: str = "vector",
        fingerprint: Fingerprint | None = None,
        root: str | Path | None = None,
        version: int | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> LanceDatabase:
        """Opens a table.

        Args:
            uri: folder, or address in object storage, such as ``s3://bucket/path``.
            table: name of the table.
            vector: its column of embeddings.
            fingerprint: of the encoder that made them; None: the one that `create` wrote.
            root: folder that the records' files are relative to.
            version: of the table; None: the latest.
            storage_options: of the object storage, as LanceDB takes them.

        Raises:
            FileNotFoundError: there is no LanceDB folder or table.
            ValueError: its vectors are none, or nothing says which encoder made them.
        """
        if "://" not in str(uri) and not Path(uri).is_dir():
            raise FileNotFoundError(f"{uri} is no LanceDB folder: check the path")
        with _lance_errors(f"table {table!r} of {uri}"):
            opened = _connect(uri, storage_options).open_table(table)
            opened.checkout(opened.version if version is None else version)
        return cls(opened, vector=vector, fingerprint=fingerprint, root=root)

    @classmethod
    def create(
        cls,
        uri: str | Path,
        table: str,
        database: Searchable,
        *,
        vector: str = "vector",
        overwrite: bool = False,
        root: str | Path | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> LanceDatabase:
        """Copies a database into a new table, in constant memory; thumbnails stay behind.

        Args:
            uri: folder, or address in object storage.
            table: name of the new table.
            database: whose rows.
            vector: name of the column of embeddings.
            overwrite: replace a table of that name.
            root: folder that the records' files are relative to.
            storage_options: of the object storage, as LanceDB takes them.

        Raises:
            ValueError: the database has a column of the name of the vectors.
        """
        if vector in database.columns:
            raise ValueError(
                f"the database has a column {vector!r} of its own: give the embeddings another "
                "name (vector=)"
            )
        schema, batches = _batches(database, vector)
        with _lance_errors(f"table {table!r} of {uri}"):
            made = _connect(uri, storage_options).create_table(
                table, batches, schema=schema, mode="overwrite" if overwrite else "create"
            )
            made.checkout(made.version)
        return cls(made, vector=vector, root=root)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return tuple(name for name in self._rows.names if name != self._rows.vector)

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        table, at = self._rows.take(self._checked(indices), self.columns)
        records = table.to_pylist()
        return [records[i] for i in at.tolist()]

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        names = self.columns if columns is None else columns
        return self._rows.all(names)

    def image(self, index: int) -> Tensor:
        """The picture of a row, read from its file: (3, h, w) in [-1, 1]."""
        return show(self.records([index])[0], self.root)

    def where(self, condition: str) -> LanceDatabase:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The rows that meet a condition, which LanceDB looks at within every search.

        Args:
            condition: SQL, such as ``label = 'dog' AND year > 2000``.
        """
        rows = self._rows
        all_ = (*rows.conditions, condition)
        return LanceDatabase(
            rows.table, vector=rows.vector, fingerprint=self._given, condition=all_, root=self.root
        )


class _Rows:
    """The rows of a table that meet a condition, and their LanceDB ids (m,), ascending."""

    def __init__(self, table: Any, vector: str, conditions: tuple[str, ...]):
        import pyarrow as pa

        self.table, self.vector, self.conditions = table, vector, conditions
        self.condition = joined(conditions)
        self.names: list[str] = table.schema.names
        kind: Any = table.schema.field(vector).type if vector in self.names else None
        if kind is None or not (
            pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
        ):
            raise ValueError(
                f"column {vector!r} of the table {table.name!r} is {kind or 'not there'}, expected "
                f"a fixed-size list of floats (vector=); columns: {', '.join(self.names)}"
            )
        self.dim: int = kind.list_size
        with self.errors():
            for one in conditions[len(conditions) < 2 :]:  # each is one by itself, or refused
                table.search().select(["_rowid"]).with_row_id(True).where(one).limit(1).to_arrow()
            batches = self._asked(table.search(), ["_rowid"]).to_batches()
            ids = [batch["_rowid"].to_numpy().astype(np.int64) for batch in batches]
        self.ids = torch.from_numpy(np.sort(np.concatenate([np.empty(0, np.int64), *ids])))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor, columns: Sequence[str]) -> tuple[Any, Tensor]:
        """Row numbers (n,) -> a pyarrow table of the distinct rows, and where each lies in it."""
        distinct, at = rows.unique(return_inverse=True)
        ids = self.ids[distinct]
        with self.errors():
            asked = self.table.take_row_ids(ids.tolist()).select([*columns, "_rowid"])
            return self._sorted(asked.to_arrow(), len(ids)), at

    def all(self, columns: Sequence[str]) -> Any:
        """A pyarrow table of every row."""
        with self.errors():
            table = self._asked(self.table.search(), [*columns, "_rowid"]).to_arrow()
            return self._sorted(table, len(self))

    def nearest(self, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, d) -> number of the query, row and vector (., d) of all that was found."""
        with self.errors():
            search = self.table.search(queries, vector_column_name=self.vector)
            search = search.distance_type("cosine").limit(k)
            found = self._asked(search, [self.vector, "_distance"]).to_arrow()
        rows = torch.searchsorted(self.ids, _integers(found["_rowid"]))
        if "query_index" in found.column_names:
            query = _integers(found["query_index"])
        else:  # LanceDB numbers the queries only where there are several
            query = torch.zeros_like(rows)
        return query, rows, self.floats(found[self.vector])

    def floats(self, column: Any) -> Tensor:
        """A column of embeddings as float32 (n, d)."""
        if column.null_count:
            raise ValueError(
                f"some rows of the table {self.table.name!r} have no {self.vector!r}: leave them "
                f'out with where("{self.vector} IS NOT NULL")'
            )
        parts = [part.flatten().to_numpy(zero_copy_only=False) for part in column.chunks]
        values = np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float32)
        return torch.from_numpy(values.reshape(-1, self.dim))

    def errors(self) -> Any:
        where = f", filter {printable(repr(self.condition))[:300]}" if self.condition else ""
        return _lance_errors(f"table {self.table.name!r}{where}")

    def _asked(self, search: Any, columns: list[str]) -> Any:
        search = search.select(columns).with_row_id(True)
        return search.where(self.condition) if self.condition else search

    def _sorted(self, table: Any, expected: int) -> Any:
        if len(table) != expected:
            raise ValueError(f"{expected - len(table)} rows are gone: open the table again")
        return table.sort_by("_rowid").drop_columns("_rowid")


class _LanceVectors(GatheredVectors):
    def __init__(self, rows: _Rows):
        self._rows, self.dim = rows, rows.dim

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Tensor) -> Tensor:
        if not len(indices):
            return torch.empty(0, self.dim)
        table, at = self._rows.take(indices, [self._rows.vector])
        return self._rows.floats(table[self._rows.vector])[at]


class _LanceIndex(Index):
    """LanceDB's own search; what it finds is sorted by exact cosine."""

    def __init__(self, rows: _Rows):
        self._rows = rows

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_search(queries, k, len(self._rows), self._rows.dim)
        parts = [self._search(part, k) for part in queries.detach().cpu().split(_QUERIES)]
        similarity, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        return similarity.to(queries.device), indices.to(queries.device)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        wide = min(k + _SPARE, len(self._rows))
        query, rows, values = self._rows.nearest(queries.float().numpy(), wide)
        counts = torch.bincount(query, minlength=len(queries))
        if int(counts.min()) < k:
            raise ValueError(
                f"LanceDB found {int(counts.min())} of k={k} neighbors: search the table without "
                "a vector index, or build it with fewer partitions"
            )
        wanted, values = queries.double()[query], values.double()
        cosine = (values * wanted).sum(1)
        cosine = cosine / (values.norm(dim=1) * wanted.norm(dim=1)).clamp_min(1e-300)
        # Equally near rows: the lower number first.
        order = torch.from_numpy(np.lexsort((rows.numpy(), -cosine.numpy(), query.numpy())))
        first = order[(counts.cumsum(0) - counts).unsqueeze(1) + torch.arange(k)]
        return cosine[first].float(), rows[first]


def _batches(database: Searchable, vector: str) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of a database, with its embeddings as one more column."""
    import pyarrow as pa

    tables = database.tables()
    first = next(tables, None)
    if first is None:
        first = database.table()
    kind, encoder = pa.list_(pa.float16(), database.fingerprint.dim), database.fingerprint.encoder
    schema = first.schema.remove_metadata().append(pa.field(vector, kind))
    schema = marked(schema, database.fingerprint)

    def batches() -> Iterator[Any]:
        start = 0
        for table in chain([first], tables):
            for batch in table.to_batches(_ROWS):
                rows = torch.arange(start, start + len(batch))
                stored, _ = storable(database.embeddings(rows), encoder, lambda row: f"row {row}")
                values = pa.array(stored.flatten().numpy())
                column = pa.FixedSizeListArray.from_arrays(values, kind.list_size)
                yield pa.record_batch([*batch.columns, column], schema=schema)
                start += len(batch)

    return schema, batches()


def _opened_again(about: dict[str, Any], conditions: tuple[str, ...], rows: str) -> LanceDatabase:
    """The rows that another process had open."""
    database = LanceDatabase.open(**about)
    for condition in conditions:
        database = database.where(condition)
    if database.fingerprint.rows != rows:
        raise ValueError(f"{about['uri']} has changed since it was opened: open it again")
    return database


def _place(table: Any) -> str:
    """Address, name and version of a table, which stand for contents that nobody has hashed."""
    address = getattr(getattr(table, "_conn", None), "uri", "")
    return f"{address} {table.name} {table.version}"


def _integers(column: Any) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _connect(uri: str | Path, storage_options: Mapping[str, str] | None) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("lancedb is not installed: pip install 'retrodiff[lance]'") from error
    return lancedb.connect(uri, storage_options=dict(storage_options) if storage_options else None)


@contextmanager
def _lance_errors(what: str) -> Iterator[None]:
    """LanceDB's errors in one line, without the places in its own source."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        reason = re.sub(r",?\s*\S+\.rs:\d+(:\d+)?", "", " ".join(str(error).split()))
        kind = FileNotFoundError if "not found" in reason else ValueError
        raise kind(f"{what}: {reason}") from error
