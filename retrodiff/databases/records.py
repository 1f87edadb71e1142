"""Records as columns of a table: every value is kept, in its own type or as text.

A column has one type. Where its values have several, or one that parquet cannot hold (an integer
beyond 64 bits, something nested deeply), the column is stored as text: JSON for what is nested,
ISO for dates, hexadecimal for bytes. Shards of one database may differ; what is read is then text
in all of them.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from retrodiff.disk.files import plain_json
from retrodiff.text import escaped, printable

DEEPEST = 16
"""Levels of lists and structs that a column may have; parquet itself ends before 100."""

NAMES = ("file", "key", "id", "url")
"""Columns that say which picture a row is of, the first of them that is there."""

TEXT = "text_columns"
"""Key of a manifest's settings: columns that some shards hold as text and others do not."""

AS_TEXT = b"retrodiff.text"
"""Key of a field's metadata: why the column is text."""


def table_of(records: Sequence[Any]) -> Any:
    """A pyarrow table from records, or tables, or both."""
    import pyarrow as pa

    tables: list[Any] = []
    for plain, group in groupby(records, lambda one: isinstance(one, Mapping)):
        some = list(group)
        tables += [_table_of_records(some)] if plain else [_storable_table(t) for t in some]
    if len(tables) == 1:
        return tables[0].combine_chunks()
    schema = one_schema([table.schema for table in tables])
    return pa.concat_tables([cast_table(table, schema) for table in tables]).combine_chunks()


def one_schema(schemas: Sequence[Any]) -> Any:
    """One pyarrow schema for the tables of all the schemas; text where their types disagree."""
    import pyarrow as pa

    # Why a column is text is known of one shard only.
    plain = [pa.schema([field.remove_metadata() for field in schema]) for schema in schemas]
    try:
        return pa.unify_schemas(plain, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    joined: dict[str, Any] = {}
    for field in (field for schema in plain for field in schema):
        joined[field.name] = _joined(joined.get(field.name, field), field)
    return pa.schema(list(joined.values()))


def cast_table(table: Any, schema: Any) -> Any:
    """The same rows with the columns and types of a schema; nulls where a column is missing."""
    import pyarrow as pa

    has = set(table.column_names)
    columns = [
        cast_column(table[field.name], field.type)
        if field.name in has
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema) if columns else table.select([])


def cast_column(column: Any, kind: Any) -> Any:
    """A pyarrow array as another type, `one_schema`'s; integers may be rounded to floats."""
    import pyarrow as pa
    import pyarrow.types as types

    if column.type == kind:
        return column
    kept = (types.is_integer, types.is_boolean, types.is_null, types.is_string)
    if is_text(kind) and not any(is_kind(column.type) for is_kind in kept):
        return pa.array([as_text(value) for value in column.to_pylist()], kind)
    return column.cast(kind, safe=False)


def as_text(value: Any) -> str | None:
    """A value of a column that is stored as text; None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, float) and not isinstance(value, bool):
        return repr(float(value))
    try:
        plain = plain_json(value)
        return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
    except ValueError:  # an integer of thousands of digits
        return hex(value) if isinstance(value, int) else "(no text)"


def is_text(kind: Any, or_null: bool = False) -> bool:
    """Whether a pyarrow type is that of text, or of nulls only."""
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or (or_null and types.is_null(kind))


def example(table: Any, column: str) -> str:
    """The first value of a column of a table that is not null, and where it is, in words."""
    for row, value in enumerate(table[column].to_pylist()):
        if value is not None:
            return f"{_shown(value)} in {_name(table.slice(row, 1).to_pylist()[0], row)}"
    return "no value"


def _table_of_records(records: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(name for record in records for name in record)
    if not names:
        return pa.table({"number": pa.nulls(len(records))})
    columns, fields = [], []
    for name in names:
        values = [record.get(name) for record in records]
        array, why = _column(values, records)
        metadata = None if why is None else {AS_TEXT: why.encode("utf-8")}
        columns.append(array)
        fields.append(pa.field(escaped(str(name)), array.type, metadata=metadata))
    return pa.table(columns, schema=pa.schema(fields))


def _storable_table(table: Any) -> Any:
    """A table whose types parquet can hold."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if not _storable(field.type):
            table = table.set_column(i, field.name, cast_column(table[field.name], pa.string()))
    return table


def _column(values: list[Any], records: Sequence[Mapping[str, Any]]) -> tuple[Any, str | None]:
    """An array of values, and why it is text if it is text in place of something else."""
    import pyarrow as pa

    array = _array(values)
    if array is None:
        array = _array(plain := [_simple(value) for value in values])
        if array is None:
            why = _reason(plain, values, records)
            return pa.array([as_text(value) for value in values], pa.string()), why
    return array, None


def _array(values: Sequence[Any]) -> Any:
    """An array that holds just these values; None if there is none."""
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
        return None
    if pa.types.is_date(array.type) and any(isinstance(value, datetime) for value in values):
        return None  # would lose the time of day
    return array if _storable(array.type) else None


def _storable(kind: Any, depth: int = 0) -> bool:
    """Whether parquet takes a type: no struct without fields, nothing too deep."""
    import pyarrow.types as types

    if types.is_struct(kind) and kind.num_fields == 0:
        return False
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return depth <= DEEPEST and all(_storable(one, depth + 1) for one in inner)


def _simple(value: Any) -> Any:
    """The same value where a table can hold it, else the nearest that JSON can."""
    if value is None or isinstance(value, (bool, int, float, date, bytes)):
        return value
    return plain_json(value)


def _reason(
    plain: Sequence[Any], values: Sequence[Any], records: Sequence[Mapping[str, Any]]
) -> str:
    """Which two values do not fit into one column, or which one fits into none."""

    def fails(last: int) -> bool:
        return _array(plain[: last + 1]) is None

    bad = bisect.bisect_left(range(len(values)), True, key=fails)
    bad = min(bad, len(values) - 1)
    first = next((i for i in range(bad) if values[i] is not None), bad)
    places = dict.fromkeys((first, bad))
    return " and ".join(f"{_shown(values[i])} in {_name(records[i], i)}" for i in places)


def _name(record: Mapping[str, Any], row: int) -> str:
    named = (record[key] for key in NAMES if record.get(key) is not None)
    return printable(next(named, f"row {row} of a shard"))


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value.bit_length()
        return str(value) if size <= 128 else f"an integer of {math.ceil(size * 0.30103)} digits"
    text = f"{value!r}" if isinstance(value, (str, float)) else str(as_text(value))
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def _joined(one: Any, other: Any) -> Any:
    import pyarrow as pa

    try:
        schemas = [pa.schema([one]), pa.schema([other])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.field(one.name, pa.string())


def read_schema(file: Path) -> Any:
    """The schema of a parquet file; unlike pyarrow's, any path will do."""
    import pyarrow.parquet as pq

    with file.open("rb") as opened:
        return cast("Any", pq).read_schema(opened)
