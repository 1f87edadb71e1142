"""Writes and maps the files that hold a database's rows.

A shard is three files: ``vectors`` (float16 embeddings and float32 norms of the stored values,
safetensors), ``records`` (parquet), and, if wanted, ``thumbnails`` (PNG or JPEG bytes with offsets,
safetensors).
"""

from __future__ import annotations

import hashlib
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
from retrodiff.databases.records import table_of
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

        files: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to write
            embeddings = self.embeddings[: self.count]
            digest = beside.submit(rows_digest, embeddings)
            tensors = {"embeddings": embeddings, "norms": self.norms[: self.count]}
            name = f"vectors-{number:06d}.safetensors"
            files[name] = save_tensors(tensors, folder / name)
            reached("vectors written")
            name = f"records-{number:06d}.parquet"
            with replacing(folder / name) as partial, partial.open("wb") as file:
                pq.write_table(table_of(self.records), file, compression="zstd")
            files[name] = about_file(folder / name)
            reached("records written")
            if self.thumbnails:
                name = f"thumbnails-{number:06d}.safetensors"
                sizes = torch.tensor([0, *map(len, self.thumbnails)], dtype=torch.int64)
                data = np.frombuffer(bytearray(b"".join(self.thumbnails)), np.uint8)
                packed = {"offsets": sizes.cumsum(0), "bytes": torch.from_numpy(data)}
                files[name] = save_tensors(packed, folder / name)
                reached("thumbnails written")
            shard = Shard(self.count, digest.result(), files, next_at, source)
        self.records, self.thumbnails, self.count = [], [], 0
        return shard


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Writes a safetensors file, all at once; its size and hash, as the manifest keeps them.

    The bytes are those of ``safetensors.torch.save_file``, hashed while they are written: reading
    them again would cost as much as writing them.
    """
    pieces = _safetensors(tensors)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(_sha256, pieces)
        with replacing(path) as partial, partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        return {"bytes": sum(map(len, pieces)), "sha256": digest.result()}


def about_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest keeps them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


_TYPES = {
    "F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}


def _safetensors(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The bytes of a safetensors file: header, then tensors, the widest types first."""
    header: dict[str, Any] = {}
    pieces, end = [memoryview(b"")], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].contiguous()
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        pieces.append(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces[0] = memoryview(len(text).to_bytes(8, "little") + text)
    return pieces


def _sha256(pieces: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read: pages come when they are touched."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    # Copy-on-write, so that the file never changes; and unlike numpy's, this map holds no file
    # descriptor, of which there may be fewer than shards.
    size = path.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    try:
        for name, about in header.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in about["data_offsets"])
                kind, shape = _TYPES[about["dtype"]], about["shape"]
                tensors[name] = data[start:end].view(kind).reshape(shape)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it, or build again") from None
    return tensors
