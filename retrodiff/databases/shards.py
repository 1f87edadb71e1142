"""Writes and maps the files that hold a database's rows.

A shard is three files: ``vectors`` (float16 embeddings and float32 norms of the stored values,
safetensors), ``records`` (parquet), and, if wanted, ``thumbnails`` (PNG or JPEG bytes with offsets,
safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.fingerprint import file_digest, rows_digest
from retrodiff.databases.manifest import Shard
from retrodiff.files import replacing


def reached(point: str) -> None:
    """A named moment of a build; fault tests end the process here."""


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

        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to write
            embeddings = self.embeddings[: self.count]
            digest = beside.submit(rows_digest, embeddings)
            tensors = {"embeddings": embeddings, "norms": self.norms[: self.count]}
            names = [f"vectors-{number:06d}.safetensors", f"records-{number:06d}.parquet"]
            save_tensors(tensors, folder / names[0])
            reached("vectors written")
            with replacing(folder / names[1]) as partial:
                pq.write_table(_table(self.records), partial, compression="zstd")
            reached("records written")
            if self.thumbnails:
                names.append(f"thumbnails-{number:06d}.safetensors")
                sizes = torch.tensor([0, *map(len, self.thumbnails)], dtype=torch.int64)
                data = np.frombuffer(bytearray(b"".join(self.thumbnails)), np.uint8)
                packed = {"offsets": sizes.cumsum(0), "bytes": torch.from_numpy(data)}
                save_tensors(packed, folder / names[2])
                reached("thumbnails written")
            files = {name: about_file(folder / name) for name in names}
            shard = Shard(self.count, digest.result(), files, next_at, source)
        self.records, self.thumbnails, self.count = [], [], 0
        return shard


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, all at once."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial)


def about_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest keeps them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


_TYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read: pages come when they are touched."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    # Copy-on-write: torch wants writable memory, and the file must never change.
    data = np.memmap(path, np.uint8, "c", offset=0)
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in about["data_offsets"])
            array = data[start:end].view(_TYPES[about["dtype"]]).reshape(about["shape"])
            tensors[name] = torch.from_numpy(array)
    return tensors


def _table(records: list[Any]) -> Any:
    """A pyarrow table from records, or from tables."""
    import pyarrow as pa

    if records and isinstance(records[0], pa.Table):
        return pa.concat_tables(records, promote_options="permissive").combine_chunks()
    names = list(dict.fromkeys(name for record in records for name in record))
    try:
        columns = {name: pa.array([r.get(name) for r in records]) for name in names}
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"records cannot be stored: {error}: give one type per column") from None
    return pa.table(columns) if columns else pa.table({"number": pa.nulls(len(records))})
