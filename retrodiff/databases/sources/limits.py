"""Checks how much memory a file would take before anything is allocated.

A parquet file of some kilobytes can stand for a hundred gigabytes: one long value and a count. So
can a compressed archive of zeros, and a header may claim any shape.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

LARGE = 2**28
"""Bytes that a column of a row group may decompress to, whatever its compressed size."""

RATIO = 200
"""How many times its compressed size a larger one may be; pictures and texts stay far below."""

BATCH = 2**26
"""Bytes of a column that are decoded at a time."""

HEADER = 10_000
"""Bytes of the longest header of an npy file, as numpy has it."""


class Header:
    """What an npy file says of its array, checked against the size of the file.

    Args:
        stream: at the beginning of the file; left behind the header.
        size: bytes of the file, uncompressed.

    Raises:
        ValueError: it is no header, of numbers or texts, or the file is too small for the array.
    """

    def __init__(self, stream: Any, size: int):
        head = stream.read(12)
        if len(head) < 12 or head[:6] != b"\x93NUMPY":
            raise ValueError("it does not begin as an npy file")
        length = struct.unpack("<I" if head[6] > 1 else "<H", head[8 : 12 if head[6] > 1 else 10])[
            0
        ]
        if length > min(HEADER, size):
            raise ValueError(f"its header claims {length} bytes")
        stream.seek(0)
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            self.shape, self.fortran, self.dtype = read(stream)
        except Exception:  # its text is parsed as Python's own, which may fail in many ways
            raise ValueError("its header is damaged") from None
        self.fortran = self.fortran and len(self.shape) > 1
        if self.dtype.kind not in "fiubSUO" or not self.dtype.itemsize:
            raise ValueError(f"it holds {self.dtype}, no numbers or texts")
        if not self.shape or min(self.shape) < 0 or 0 in self.shape[1:]:
            raise ValueError(f"it claims the shape {self.shape}")
        item = 1 if self.dtype.hasobject else self.dtype.itemsize
        self.bytes = item * int(np.prod(self.shape, dtype=object))
        if self.bytes > size:
            raise ValueError(f"it claims the shape {self.shape}, the file has {size} bytes")


def open_parquet(file: Path, **options: Any) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` whose columns are of a size that fits the file.

    Args:
        file: the parquet file.
        **options: of ``ParquetFile``.

    Raises:
        ValueError: it is no whole parquet file, or would unfold to far more than it holds.
    """
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, **options)
        opened.schema_arrow.names  # noqa: B018 (names that are no text are damage too)
        check_ratio(opened.metadata, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: check the path") from None
    except Unfolds:
        raise
    except Exception as error:
        raise ValueError(f"{file} is no whole parquet file: {one_line(error)}") from None
    return opened


class Unfolds(ValueError):
    """A file that would take far more memory than its size."""


def check_ratio(metadata: Any, file: Path) -> None:
    """Refuses a parquet file that would decompress to far more than pictures and texts do."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            large, small = column.total_uncompressed_size, max(column.total_compressed_size, 1)
            if "." in column.path_in_schema:  # a list may stand for any number of equal values
                large = max(large, 8 * column.num_values)
            if large > max(LARGE, RATIO * small):
                raise Unfolds(
                    f"{file}: column {column.path_in_schema} would decompress {small} bytes to "
                    f"{large} (row group {number}): write it again with smaller row groups"
                )


def rows_at_a_time(file: Path, most: int) -> int:
    """Rows of a parquet file that take at most `BATCH` bytes per column, however they are stored.

    A text that occurs often is stored once; the longest of them counts.
    """
    import pyarrow as pa
    from pyarrow.compute import call_function

    opened = open_parquet(file, pre_buffer=False)
    texts = [
        field.name
        for field in opened.schema_arrow
        if pa.types.is_string(field.type) or pa.types.is_binary(field.type)
    ]
    longest = 1
    opened = open_parquet(file, pre_buffer=False, read_dictionary=texts)
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if any("DELTA" in encoding for encoding in column.encodings):  # shared beginnings
                longest = max(longest, column.total_uncompressed_size)
        first = opened.iter_batches(1, row_groups=[number], columns=texts, use_threads=False)
        for column in next(iter(first), pa.record_batch({})).columns:
            if pa.types.is_dictionary(column.type):
                lengths = call_function("binary_length", [column.dictionary]).to_pylist()
                longest = max(longest, *(length or 0 for length in lengths))
    return min(max(BATCH // longest, 1), most)


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
