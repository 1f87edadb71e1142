"""Parquet files that hold an embedding per row, as a database: nothing is copied or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.digests import SHARD_ROWS, rows_digest, rows_hash
from retrodiff.databases.marks import agreed, mark_of
from retrodiff.databases.record_files import MOST, plain_table
from retrodiff.databases.records import cast_table, one_schema
from retrodiff.databases.searchable import Searchable, show
from retrodiff.databases.sources.groups import plain_value
from retrodiff.databases.sources.limits import BATCH, RATIO, one_line, open_parquet
from retrodiff.databases.sources.walk import files_below
from retrodiff.databases.storable import storable
from retrodiff.disk.files import given, listed
from retrodiff.indexes import Vectors
from retrodiff.interfaces import Fingerprint, Record

UNBOUNDED = "DELTA_BYTE_ARRAY"
"""An encoding in which a text of a few bytes may stand for any number of long ones."""


class ParquetDatabase(Searchable):
    """The rows of parquet files with a column of embeddings; the other columns are the records.

    Embeddings are read when the database is opened and held in float16, two bytes a number; records
    are read from the files, a row group at a time. Search is exact. The same rows in the same order
    have the same fingerprint here and in a folder that `build_database` made.

    Args:
        files: one, or several in the order that their rows shall have.
        vector: the column of embeddings, a list or fixed-size list of floats.
        fingerprint: of the encoder that made them; None: the one that the first file has under
            ``retrodiff`` in the metadata of its schema, as JSON.
        root: folder that the records' files are relative to.

    Raises:
        ValueError: a file is no whole parquet file, has other columns, or lacks an embedding
            somewhere; or nothing says which encoder made them.

    Examples:
        >>> import pyarrow as pa
        >>> import pyarrow.parquet as pq
        >>> import torch
        >>> from retrodiff import Fingerprint, Query
        >>> from retrodiff.databases import ParquetDatabase
        >>> table = pa.table(
        ...     {"embedding": [[1.0, 0.0], [0.0, 1.0]], "file": ["a.png", "b.png"]}
        ... )
        >>> pq.write_table(table, "rows.parquet")
        >>> made_by = Fingerprint(encoder="mine", weights="", preprocessing="none", dim=2)
        >>> database = ParquetDatabase("rows.parquet", fingerprint=made_by)
        >>> database.search(Query(torch.tensor([[0.1, 0.9]])), k=1).indices.tolist()
        [[1]]
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        vector: str = "embedding",
        fingerprint: Fingerprint | None = None,
        root: str | Path | None = None,
    ):
        files = listed(files)
        if not files:
            raise ValueError("no parquet files: give at least one")
        self.root = root
        opened = [_Opened(given(file), vector) for file in files]
        for one in opened:
            name = str(one.file)
            fingerprint = agreed(fingerprint, mark_of(one.schema, name), name)
        assert fingerprint is not None
        self._schema = one_schema([one.records for one in opened])
        self._groups = [group for one in opened for group in one.groups(fingerprint.dim)]
        self._starts = np.cumsum([0, *(group.rows for group in self._groups)])
        stored = torch.empty(int(self._starts[-1]), fingerprint.dim, dtype=torch.float16)
        norms = torch.empty(len(stored))
        at = 0
        for one in opened:
            for part, lengths in one.embeddings(fingerprint):
                end = at + len(part)
                stored[at:end], norms[at:end], at = part, lengths, end
        digests = [rows_digest(part) for part in stored.split(SHARD_ROWS) if len(part)]
        super().__init__(
            Vectors([stored], [norms]), replace(fingerprint, rows=rows_hash(digests)), None
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        vector: str = "embedding",
        fingerprint: Fingerprint | None = None,
        root: str | Path | None = None,
    ) -> ParquetDatabase:
        """Opens one parquet file, or all in a folder and below it in the order people count.

        Args:
            path: file or folder.
            vector: the column of embeddings.
            fingerprint: of the encoder that made them; None: the one in the files' metadata.
            root: folder that the records' files are relative to.
        """
        place = given(path)
        files = [place]
        if place.is_dir():
            found = [place / one.name for one in files_below(place) if one.problem is None]
            files = [file for file in found if file.suffix.lower() == ".parquet"]
            if not files:
                raise FileNotFoundError(f"{path} holds no parquet files: check the path")
        return cls(files, vector=vector, fingerprint=fingerprint, root=root)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return tuple(self._schema.names) or ("number",)

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        rows = self._checked(indices).numpy()
        if not self._schema.names:
            return [{"number": row} for row in rows.tolist()]
        found: list[Record] = [{}] * len(rows)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(groups).tolist():
            places = np.flatnonzero(groups == number)
            table = self._groups[number].table(self._schema.names)
            table = cast_table(table.take(rows[places] - self._starts[number]), self._schema)
            for i, place in enumerate(places.tolist()):
                found[place] = {name: plain_value(table[name][i]) for name in table.column_names}
        return found

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        import pyarrow as pa

        return pa.concat_tables(list(self.tables(columns)))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The same, one row group at a time."""
        import pyarrow as pa

        names = self.columns if columns is None else columns
        if unknown := [name for name in names if name not in self.columns]:
            known = ", ".join(self.columns)
            raise ValueError(f"unknown column {unknown[0]!r}; columns: {known}")
        if not self._schema.names:
            yield pa.table({name: np.arange(len(self)) for name in names})
            return
        schema = pa.schema([self._schema.field(name) for name in names])
        yield schema.empty_table()
        for group in self._groups:
            yield cast_table(group.table(names), schema)

    def image(self, index: int) -> Tensor:
        """The picture of a row, read from its file: (3, h, w) in [-1, 1]."""
        return show(self.records([index])[0], self.root)


class _Group(NamedTuple):
    """Rows of a file that are read together; ``mark`` tells whether the file has changed."""

    file: Path
    mark: tuple[int, int]
    number: int
    rows: int
    known: tuple[str, ...]

    def table(self, columns: Sequence[str]) -> Any:
        """Those of the columns that the file has."""
        return _table(self, tuple(name for name in columns if name in self.known))


class _Opened:
    """A parquet file as it was opened, checked before a row is read."""

    def __init__(self, file: Path, vector: str):
        import pyarrow as pa

        self.file, self.vector, self.mark = file, vector, _mark(file)
        self.opened = open_parquet(file, pre_buffer=False)
        self.schema = self.opened.schema_arrow
        names = self.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file} has two columns {twice!r}: rename one of them")
        self.kind = self.schema.field(vector).type if vector in names else None
        if self.kind is None or not _is_vector(self.kind):
            raise ValueError(
                f"column {vector!r} of {file} is {self.kind or 'not there'}, expected a list of "
                f"floats (vector=); columns: {', '.join(names)}"
            )
        plain = [field for field in self.schema if field.name != vector]
        self.records = pa.schema([pa.field(f.name, _value_type(f.type)) for f in plain])

    def groups(self, dim: int) -> list[_Group]:
        """The row groups, if they can hold what they claim."""
        wide = getattr(self.kind, "list_size", dim)
        if wide != dim:
            raise self._wrong(f"has width {wide}", dim)
        groups, numbers = [], 0
        for number in range(self.opened.num_row_groups):
            about = self.opened.metadata.row_group(number)
            for column in map(about.column, range(about.num_columns)):
                if column.path_in_schema.startswith(f"{self.vector}."):
                    numbers += column.num_values
                    if column.num_values != about.num_rows * dim:
                        found = f"holds {column.num_values} numbers in {about.num_rows} rows"
                        raise self._wrong(found, dim)
                elif UNBOUNDED in column.encodings:
                    raise ValueError(
                        f"{self.file}: column {column.path_in_schema} is stored as {UNBOUNDED}, "
                        "whose size cannot be known before it is read: write it in another encoding"
                    )
            known = tuple(self.records.names)
            groups.append(_Group(self.file, self.mark, number, about.num_rows, known))
        if 8 * numbers > max(MOST, RATIO * self.mark[0]):
            raise ValueError(
                f"{self.file} would unfold from {self.mark[0]} bytes to {8 * numbers} of "
                "embeddings, many times the same: leave repeated rows out"
            )
        return groups

    def embeddings(self, fingerprint: Fingerprint) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored rows (n, d) in float16 and their norms (n,), piece by piece."""
        import pyarrow as pa

        dim, start = fingerprint.dim, 0
        batches = self.opened.iter_batches(
            max(BATCH // (8 * dim), 1), columns=[self.vector], use_threads=False
        )
        try:
            for batch in batches:
                values = self._values(batch.column(0), start, dim)
                first = start

                def name(row: int, first: int = first) -> str:
                    return f"row {first + row} of {self.file}"

                yield storable(values, fingerprint.encoder, name)
                start += len(batch)
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise ValueError(
                f"{self.file} is damaged ({one_line(error)}): fetch it again"
            ) from None
        if start != self.opened.metadata.num_rows:
            raise ValueError(f"{self.file} is damaged: it ends at row {start}")

    def _values(self, column: Any, start: int, dim: int) -> Tensor:
        from pyarrow.compute import call_function

        lengths = call_function("list_value_length", [column])
        lengths = lengths.fill_null(0).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero(lengths != dim)).size:
            raise self._wrong(f"holds {lengths[wrong[0]]} numbers in row {start + wrong[0]}", dim)
        flat = column.flatten()
        if flat.null_count:
            raise self._wrong(f"lacks a number in one of the rows from {start}", dim)
        return torch.from_numpy(np.array(flat.to_numpy(zero_copy_only=False)).reshape(-1, dim))

    def _wrong(self, what: str, dim: int) -> ValueError:
        return ValueError(
            f"column {self.vector!r} of {self.file} {what}, fingerprint.dim={dim}: give every row "
            "an embedding, and the fingerprint of the encoder that made them"
        )


@lru_cache(4)
def _table(group: _Group, columns: tuple[str, ...]) -> Any:
    """The records of a row group."""
    import pyarrow as pa

    if _mark(group.file) != group.mark:
        raise ValueError(f"{group.file} has changed since it was opened: open it again")
    file = open_parquet(group.file, pre_buffer=False)
    about = file.metadata.row_group(group.number)
    leaves = [about.column(i) for i in range(about.num_columns)]
    texts = sorted(c.path_in_schema for c in leaves if c.physical_type == "BYTE_ARRAY")
    own = pa.schema([pa.field(f.name, _value_type(f.type)) for f in file.schema_arrow])
    try:
        opened = open_parquet(group.file, pre_buffer=False, read_dictionary=texts)
        table = opened.read_row_group(group.number, columns=list(columns), use_threads=False)
        if columns and len(table) != group.rows:
            raise ValueError(f"{len(table)} of {group.rows} rows")
        if not columns:
            table = pa.table({"number": pa.nulls(group.rows)})
            own = table.schema
        return plain_table(table, own, group.mark[0])
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise ValueError(
            f"{group.file} cannot be read ({one_line(error)}): fetch it again"
        ) from None


def _is_vector(kind: Any) -> bool:
    import pyarrow.types as types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists) and types.is_floating(kind.value_type)


def _value_type(kind: Any) -> Any:
    """A type without the dictionary that a category of pandas has."""
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


def _mark(file: Path) -> tuple[int, int]:
    """Size and time of a file."""
    try:
        about = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: check the path") from None
    return about.st_size, about.st_mtime_ns
