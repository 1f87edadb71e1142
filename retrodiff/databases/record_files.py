"""The records of a database's shards, read from parquet files that were checked before.

A file is compared with its hash, and its rows with the manifest's, before a row is decoded. Texts
are decoded as the file keeps them, each distinct one once: how much they unfold to is known before
memory is taken for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from retrodiff.databases.manifest import AGAIN, Shard
from retrodiff.databases.records import cast_table, one_schema
from retrodiff.databases.sources.limits import RATIO, one_line, open_parquet

MOST = 2 * 1024**3
"""Bytes that the records of a shard may unfold to, however small their file is."""

PIECE = 65_536
"""Rows of a text column that become one array, which holds 2 GB at most."""

ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}
"""What records are stored in; others let a text of a few bytes stand for any number."""


class RecordFiles:
    """Tables of the shards' records.

    Args:
        shards: of the manifest.
        checked: name of a file -> its path, once it was compared with its hash.
        text: columns that are text because other shards hold them as text.
    """

    def __init__(
        self, shards: Sequence[Shard], checked: Callable[[str], Path], text: Sequence[str] = ()
    ):
        self.shards, self.checked, self.text = shards, checked, text
        self.recent = lru_cache(4)(self._alone)

    def _alone(self, number: int) -> Any:
        """The table of a shard, its own columns, in the types that they have in all shards."""
        import pyarrow as pa

        table = self.read(number)
        types = {name: pa.string() for name in self.text}
        kinds = [(field.name, types.get(field.name, field.type)) for field in table.schema]
        return cast_table(table, pa.schema(kinds)) if self.text else table

    @cached_property
    def schema(self) -> Any:
        """One pyarrow schema for all shards."""
        return one_schema([self._open(number)[0] for number in range(len(self.shards))])

    def schema_of(self, columns: Sequence[str] | None) -> Any:
        """The same for some columns."""
        import pyarrow as pa

        if columns is None:
            return self.schema
        for name in columns:
            if name not in self.schema.names:
                known = ", ".join(self.schema.names)
                raise ValueError(f"unknown column {name!r}; columns: {known}")
        return pa.schema([self.schema.field(name) for name in columns])

    def read(self, number: int, schema: Any = None) -> Any:
        """The table of a shard: its own columns, or those of a schema, null where it has none.

        Raises:
            ValueError: the file is damaged, or would take far more memory than its size.
        """
        import pyarrow as pa

        own, file = self._open(number)
        path = self.checked(str(self.shards[number].file("records")))
        names = own.names if schema is None else [n for n in schema.names if n in own.names]
        if not names:
            return cast_table(pa.table({"number": pa.nulls(self.shards[number].rows)}), schema)
        try:
            table = file.read(columns=names, use_threads=False)
            table = plain_table(table, own, path.stat().st_size)
        except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
            raise ValueError(f"{path} cannot be read ({one_line(error):.300}): {AGAIN}") from None
        return table if schema is None else cast_table(table, schema)

    def _open(self, number: int) -> tuple[Any, Any]:
        """Schema of a shard's file, and the file opened so that texts stay as they are kept."""
        shard = self.shards[number]
        path = self.checked(str(shard.file("records")))
        file = open_parquet(path, pre_buffer=False)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        if file.metadata.num_rows != shard.rows:
            raise ValueError(
                f"{path} holds the records of {file.metadata.num_rows} rows, its manifest says "
                f"{shard.rows}: {AGAIN}"
            )
        if others := {e for column in columns for e in column.encodings} - ENCODINGS:
            raise ValueError(f"{path} is stored as {min(others)}, as no record is: {AGAIN}")
        texts = {c.path_in_schema for c in columns if c.physical_type == "BYTE_ARRAY"}
        opened = open_parquet(path, pre_buffer=False, read_dictionary=sorted(texts))
        return file.schema_arrow, opened


def plain_table(table: Any, schema: Any, size: int) -> Any:
    """A table whose texts stand where they occur, in the types of a schema.

    Args:
        table: as it was read with ``read_dictionary``, so that each distinct text is there once.
        schema: has its columns, perhaps among others.
        size: bytes of the file that it comes from.

    Raises:
        ValueError: the texts would take far more memory than the file.
    """
    import pyarrow as pa

    most = max(MOST, RATIO * size)
    if sum(unfolded(column) for column in table.columns) > most:
        raise ValueError(f"its texts unfold to more than {most:,} bytes")
    kinds = pa.schema([schema.field(name) for name in table.column_names])
    return pa.Table.from_batches(table.to_batches(PIECE), table.schema).cast(kinds)


def unfolded(array: Any) -> int:
    """Bytes of a pyarrow array once every text stands where it occurs."""
    import pyarrow as pa
    import pyarrow.types as types

    pc: Any = importlib.import_module("pyarrow.compute")  # its functions are made when imported
    if isinstance(array, pa.ChunkedArray):
        return sum(unfolded(chunk) for chunk in array.chunks)
    if types.is_dictionary(array.type):
        lengths = pc.cast(pc.binary_length(array.dictionary), pa.int64())
        return 8 * len(array) + (pc.sum(lengths.take(array.indices)).as_py() or 0)
    if types.is_struct(array.type):
        return sum(unfolded(array.field(i)) for i in range(array.type.num_fields))
    if types.is_list(array.type) or types.is_large_list(array.type):
        return 8 * len(array) + unfolded(array.flatten())
    return array.nbytes
