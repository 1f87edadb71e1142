"""Writes and maps the files that hold a database's rows.

A shard is three files: ``vectors`` (float16 embeddings and float32 norms of the stored values,
safetensors), ``records`` (parquet), and, if wanted, ``thumbnails`` (bytes of PNG, JPEG or
WebP files with offsets, safetensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.digests import rows_digest
from retrodiff.databases.manifest import AGAIN, Shard
from retrodiff.databases.records import table_of
from retrodiff.disk.files import atomic_write, fault_point
from retrodiff.disk.hashed import about_file, check_file
from retrodiff.disk.tensors import map_tensors, write_tensors
from retrodiff.text import printable


class ShardBuffer:
    """Rows of the shard that is being filled; its size in memory is the shard's.

    Args:
        rows: rows per shard.
        dim: width of an embedding.
    """

    def __init__(self, rows: int, dim: int):
        self.embeddings = torch.empty(rows, dim, dtype=torch.float16)
        self.norms = torch.empty(rows)
        self.records: list[Any] = []
        self.thumbnails: list[bytes] = []
        self.count = 0

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return len(self.embeddings) - self.count

    def add(
        self,
        embeddings: Tensor,  # (n, d) float16, finite
        norms: Tensor,  # (n,)
        records: Sequence[Mapping[str, Any]] | Any,  # n records, or a pyarrow table of n rows
        thumbnails: Sequence[bytes] = (),
    ) -> None:
        """Appends rows that fit."""
        n = len(embeddings)
        self.embeddings[self.count : self.count + n] = embeddings
        self.norms[self.count : self.count + n] = norms
        self.count += n
        if isinstance(records, Sequence):
            self.records.extend(records)
        else:
            self.records.append(records)
        self.thumbnails.extend(thumbnails)

    def write(self, folder: Path, number: int, next_at: tuple[int, int], source: int = 0) -> Shard:
        """Writes the shard's files and empties the buffer."""
        import pyarrow.parquet as pq

        files: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to write
            embeddings = self.embeddings[: self.count]
            digest = beside.submit(rows_digest, embeddings)
            tensors = {"embeddings": embeddings, "norms": self.norms[: self.count]}
            name = f"vectors-{number:06d}.safetensors"
            files[name] = write_tensors(folder / name, tensors)
            fault_point("vectors written")
            name = f"records-{number:06d}.parquet"
            with atomic_write(folder / name) as partial, partial.open("wb") as file:
                pq.write_table(table_of(self.records), file, compression="zstd")
            files[name] = about_file(folder / name)
            fault_point("records written")
            if self.thumbnails:
                name = f"thumbnails-{number:06d}.safetensors"
                sizes = torch.tensor([0, *map(len, self.thumbnails)], dtype=torch.int64)
                data = np.frombuffer(bytearray(b"".join(self.thumbnails)), np.uint8)
                packed = {"offsets": sizes.cumsum(0), "bytes": torch.from_numpy(data)}
                files[name] = write_tensors(folder / name, packed)
                fault_point("thumbnails written")
            shard = Shard(self.count, digest.result(), files, next_at, source)
        self.records, self.thumbnails, self.count = [], [], 0
        return shard


def map_shard(path: Path, rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Embeddings (rows, dim) and norms (rows,) of a vectors file, mapped and not read."""
    tensors = map_tensors(path, again=AGAIN)
    expected = {"embeddings": (torch.float16, (rows, dim)), "norms": (torch.float32, (rows,))}
    check_layout(path, tensors, expected)
    return tensors["embeddings"], tensors["norms"]


class Thumbnails:
    """The small pictures of a shard: bytes of PNG, JPEG or WebP files, mapped and not read.

    Args:
        path: a thumbnails file.
        rows: of the shard.
    """

    def __init__(self, path: Path, rows: int):
        tensors = map_tensors(path, again=AGAIN)
        size = tensors["bytes"].numel() if "bytes" in tensors else 0
        expected = {"offsets": (torch.int64, (rows + 1,)), "bytes": (torch.uint8, (size,))}
        check_layout(path, tensors, expected)
        self.path, self.offsets, self.data = path, tensors["offsets"], tensors["bytes"]

    def __getitem__(self, row: int) -> bytes:
        start, end = self.offsets[row : row + 2].tolist()
        if not 0 <= start <= end <= len(self.data):
            raise ValueError(
                f"{self.path} is damaged (bytes {start} to {end} of row {row}): {AGAIN}"
            )
        return self.data[start:end].numpy().tobytes()


def read_deleted(path: Path, about: Mapping[str, Any], rows: int) -> Tensor:
    """The sorted numbers (n,) of the deleted rows, from a file that is compared with its hash."""
    check_file(path, about, AGAIN)
    tensors = map_tensors(path, again=AGAIN)
    check_layout(path, tensors, {"rows": (torch.int64, (about["rows"],))})
    deleted = tensors["rows"].clone()
    inside = 0 <= int(deleted[0]) and int(deleted[-1]) < rows
    if not inside or not bool((deleted.diff() > 0).all()):
        raise ValueError(f"{path} is damaged (no sorted numbers of {rows} rows): {AGAIN}")
    return deleted


def check_layout(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Refuses a file that holds other tensors than its manifest says."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != dict(expected):
        raise ValueError(
            f"{path} holds {_shown(found)}, its manifest says {_shown(expected)}: {AGAIN}"
        )


def _shown(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{printable(name[:40])} {shape} {str(dtype).removeprefix('torch.')}"
        for name, (dtype, shape) in sorted(layout.items())[:4]
    )
