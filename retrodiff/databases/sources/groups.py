"""Rows of parquet and arrow files one at a time, so that memory does not follow what they claim."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from retrodiff.databases.sources.limits import one_line, open_parquet
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.text import escaped


class RowGroups:
    """The rows of a parquet file, decoded one by one; going back begins the row group anew.

    Args:
        file: the parquet file.
        columns: the ones that are read.
    """

    def __init__(self, file: Path, columns: Sequence[str]):
        self.columns, self._lock = list(columns), Lock()
        self._opened = open_parquet(file, pre_buffer=False, buffer_size=2**20)
        self._group, self._at = -1, 0
        self._rows: Iterator[Any] = iter(())
        self._broken: dict[int, tuple[int, str]] = {}

    def row(self, group: int, i: int) -> Any:
        """Row ``i`` of a row group, as a record batch of one row.

        Raises:
            UnreadableImage: it lies at or behind a place where the group is damaged.
        """
        with self._lock:
            if group in self._broken and i >= self._broken[group][0]:
                raise UnreadableImage(self._broken[group][1])
            if group != self._group or i < self._at:
                self._group, self._at = group, 0
                self._rows = self._opened.iter_batches(
                    batch_size=1, row_groups=[group], columns=self.columns, use_threads=False
                )
            while True:
                try:
                    row = next(self._rows)
                except Exception as error:
                    reason = f"damaged row group: {one_line(error)}"
                    self._broken[group], self._group = (self._at, reason), -1
                    raise UnreadableImage(reason) from None
                self._at += 1
                if self._at > i:
                    return row


@lru_cache(64)
def arrow_batches(file: Path, mark: int) -> tuple[Any, list[Any]]:
    """Schema and record batches of an arrow stream, memory-mapped; ``mark`` is its time."""
    import pyarrow as pa

    del mark
    try:
        with pa.memory_map(str(file)) as mapped:
            for message in pa.ipc.MessageReader.open_stream(mapped):
                if _compressed(message.metadata.to_pybytes()):
                    raise ValueError(
                        f"{file} is compressed, which cannot be mapped: save it without compression"
                    )
        with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
            return stream.schema, list(stream)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, MemoryError, OSError, struct.error, IndexError) as error:
        raise ValueError(f"{file} is no whole arrow stream: {one_line(error)}") from None


@lru_cache(8)
def checked_batch(file: Path, mark: int, number: int) -> Any:
    """A record batch of an arrow stream whose offsets lie within it.

    Raises:
        UnreadableImage: they do not.
    """
    import pyarrow as pa

    batch = arrow_batches(file, mark)[1][number]
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise UnreadableImage(f"damaged batch {number} of {file.name}: {one_line(error)}") from None
    return batch


def plain_value(scalar: Any) -> Any:
    """A pyarrow scalar as a Python value; as text where Python has none for it."""
    try:
        value = scalar.as_py()
    except (ValueError, OverflowError):  # invalid UTF-8, years beyond 9999, nanoseconds
        try:
            return str(scalar.cast("string").as_py())
        except Exception:
            data = getattr(scalar, "as_buffer", lambda: None)()
            return None if data is None else bytes(data).decode("utf-8", "backslashreplace")
    return escaped(value) if isinstance(value, str) else value


def _compressed(message: bytes) -> bool:
    """Whether the flatbuffer of an arrow message says that its buffers are compressed."""

    def table(at: int) -> int:
        return at + struct.unpack_from("<I", message, at)[0]

    def field(of: int, number: int) -> int:
        """Where a field of a table lies; 0: it is left out."""
        names = of - struct.unpack_from("<i", message, of)[0]
        size = struct.unpack_from("<H", message, names)[0]
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", message, names + place)[0] if place + 2 <= size else 0
        return of + offset if offset else 0

    root = table(0)
    kind, header = field(root, 1), field(root, 2)
    if not kind or not header or message[kind] not in (2, 3):  # dictionary batch, record batch
        return False
    batch = table(header)
    if message[kind] == 2:
        data = field(batch, 1)
        if not data:
            return False
        batch = table(data)
    return field(batch, 3) != 0
