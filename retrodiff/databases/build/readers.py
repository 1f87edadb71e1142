"""Reads large files of embeddings and metadata piece by piece, in the order of their rows."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrodiff.databases.sources.limits import Header, one_line, open_parquet, rows_at_a_time
from retrodiff.disk.unpickling import read_plain_pickle

WHOLE = 2**29
"""Bytes of the largest array that has to be in memory as a whole."""

HELD = 2**28
"""Bytes of the largest piece of records."""

INFLATED = 1_100
"""How many times its compressed size an array may be; DEFLATE reaches 1,032."""

_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, TypeError),
    *(SyntaxError, OverflowError, MemoryError, RecursionError, RuntimeError, struct.error),
)


class NpyArray:
    """The array of an npy file, memory-mapped from its first piece to its last.

    A map holds a file descriptor, and there may be more files than the system lets be open.

    Args:
        file: the npy file.
    """

    def __init__(self, file: Path):
        self.file = file
        self._mapped: np.ndarray | None = None
        self.shape = self._map().shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows, as they lie in the file."""
        start, end, _ = rows.indices(len(self))
        mapped = self._map() if self._mapped is None else self._mapped
        self._mapped = None if end == len(self) else mapped
        return mapped[start:end]

    def _map(self) -> np.ndarray:
        try:
            with self.file.open("rb") as opened:
                Header(opened, self.file.stat().st_size)
            return np.load(self.file, mmap_mode="c", allow_pickle=False)
        except FileNotFoundError:
            raise
        except _DAMAGED as error:
            raise ValueError(
                f"{self.file} is no whole npy file of numbers: {one_line(error)}"
            ) from None


class NpzArray:
    """One array of an npz file; a piece of rows is read when it is asked for.

    Compressed or not, the file is read once from its beginning to its end, and its checksum is
    compared. An array of objects or in Fortran's order has to be read whole, and may take a
    half a gigabyte at most.

    Args:
        file: the npz file.
        name: of the array.
    """

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name
        self._zip: zipfile.ZipFile | None = None
        self._stream: Any = None
        self._whole: np.ndarray | None = None
        self._at = 0
        self._open()
        self._close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows as an array of their own."""
        start, end, _ = rows.indices(len(self))
        try:
            if self._fortran or self.dtype.hasobject:
                piece = self._read_whole()[start:end]
                if end == len(self):
                    self._whole = None
                return piece
            return self._read(start, end)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(
                f"{self.file} is damaged ({one_line(error)}): fetch it again"
            ) from None

    def _read(self, start: int, end: int) -> np.ndarray:
        row = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if self._stream is None or start < self._at:
            self._stream, self._at = self._open(), 0
        self._stream.seek((start - self._at) * row, 1)
        data = bytearray((end - start) * row)  # writable, so that torch may take it as it is
        view, filled = memoryview(data), 0
        while filled < len(data) and (n := self._stream.readinto(view[filled:])):
            filled += n
        if filled < len(data):
            raise EOFError(f"{self.name} ends at row {start + filled // max(row, 1)}")
        self._at = end
        if end == len(self):
            self._stream.read(1)  # reaching the end is what compares the checksum
            self._close()
        return np.frombuffer(data, self.dtype).reshape(end - start, *self.shape[1:])

    def _read_whole(self) -> np.ndarray:
        if self._whole is None:
            stream = self._open()
            if self._size > WHOLE:
                raise ValueError(
                    f"{self.name} of {self.file} takes {self._size} bytes, and its order asks for "
                    "all at once: save it in C order, in smaller parts"
                )
            if self.dtype.hasobject:
                name = f"{self.name} of {self.file}"
                self._whole = np.asarray(read_plain_pickle(stream, name)).reshape(self.shape)
            else:
                flat = np.frombuffer(bytearray(stream.read()), self.dtype)
                self._whole = flat.reshape(self.shape, order="F")
            self._close()
        return self._whole

    def _open(self) -> Any:
        """The member behind its header, which is read into shape and type."""
        self._close()
        try:
            self._zip = zipfile.ZipFile(self.file)
            about = self._zip.getinfo(f"{self.name}.npy")
            if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is compressed as numpy never does")
            if about.file_size > INFLATED * about.compress_size:
                raise ValueError(f"{about.compress_size} bytes claim to be {about.file_size}")
            self._stream = self._zip.open(about)
            header = Header(self._stream, about.file_size)
        except FileNotFoundError:
            raise
        except _DAMAGED as error:
            self._close()
            raise ValueError(
                f"{self.file} is truncated, or no npz file with an array {self.name!r} "
                f"({one_line(error)}): fetch it again and compare its size"
            ) from None
        self.shape, self.dtype, self._fortran = header.shape, header.dtype, header.fortran
        self._size = about.file_size
        return self._stream

    def _close(self) -> None:
        for opened in (self._stream, self._zip):
            if opened is not None:
                opened.close()
        self._stream = self._zip = None


def npz_names(file: Path) -> list[str]:
    """Names of the arrays in an npz file."""
    try:
        with zipfile.ZipFile(file) as opened:
            return [name.removesuffix(".npy") for name in opened.namelist()]
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is truncated, or no npz file ({one_line(error)}): fetch it again and compare "
            "its size"
        ) from None


class ParquetRows:
    """The rows of a parquet file, as tables; called with first and last row in ascending order.

    Args:
        file: the parquet file.
        names: new names of columns.
    """

    def __init__(self, file: Path, names: Mapping[str, str] | None = None):
        self.file, self.names = file, dict(names or {})
        self.rows: int = open_parquet(file).metadata.num_rows
        self._batches: Any = None
        self._held: list[Any] = []
        self._at = 0

    def __len__(self) -> int:
        return self.rows

    def __call__(self, start: int, end: int) -> Any:
        """Rows ``start`` to ``end`` as a pyarrow table."""
        import pyarrow as pa

        if self._batches is None or start < self._at:
            self._batches, self._held, self._at = self._open(), [], 0
        while self._at + sum(map(len, self._held)) < end:
            try:
                self._held.append(next(self._batches))
            except (pa.ArrowException, OSError, StopIteration) as error:
                raise self._damaged(error) from None
            self._forget(start)
            if sum(batch.nbytes for batch in self._held) > HELD:
                raise ValueError(
                    f"{self.file} has records of more than {HELD} bytes in rows {start} to {end}: "
                    "leave its long columns out"
                )
        table = pa.Table.from_batches(self._held).slice(start - self._at, end - start)
        self._forget(end)
        if end == self.rows:
            self._batches = None  # closes the file
        return table.rename_columns([self.names.get(n, n) for n in table.column_names])

    def _open(self) -> Any:
        try:
            rows = rows_at_a_time(self.file, 8192)
            return open_parquet(self.file, memory_map=True, pre_buffer=False).iter_batches(rows)
        except OSError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.file} is damaged ({one_line(error)}): fetch it again")

    def _forget(self, row: int) -> None:
        """Lets go of what lies wholly before a row."""
        while self._held and self._at + len(self._held[0]) <= row:
            self._at += len(self._held.pop(0))
