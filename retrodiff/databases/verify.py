"""Finds what is wrong with a database on disk: every byte is read, whatever was read before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.databases.digests import rows_digest
from retrodiff.databases.manifest import Shard
from retrodiff.databases.row_files import Thumbnails
from retrodiff.disk.hashed import file_digest
from retrodiff.indexes.saved import faults_of_index, own_index_files
from retrodiff.indexes.vectors import row_norms

if TYPE_CHECKING:
    from retrodiff.databases.store import EmbeddingDatabase

BLOCK = 65_536
"""Rows that are looked at a time."""


def faults(database: EmbeddingDatabase) -> list[str]:
    """One line for each fault; see `EmbeddingDatabase.verify`."""
    wrong = {
        name: fault
        for name, about in database.manifest.files.items()
        if (fault := _changed(database._here(name), name, about)) is not None
    }
    found = list(wrong.values())
    for number, shard in enumerate(database.manifest.shards):
        if not wrong.keys() & set(shard.files):
            found += _faults_of_shard(database, number, shard)
    folders = database.index_folders()
    with suppress(OSError):  # a home that cannot be written holds no index
        home = database._home() / "indexes"
        names = {name.partition("/")[0] for name in own_index_files(home)}
        folders |= {name: home / name for name in names - folders.keys() if "." not in name}
    for name, folder in sorted(folders.items()):
        found += [f"index {name}: {fault}" for fault in faults_of_index(folder)]
    return found


def _changed(path: Path, name: str, about: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != about["bytes"]:
        return f"{name} has {size} bytes, expected {about['bytes']}"
    return (
        None if file_digest(path) == about["sha256"] else f"{name} has changed since it was written"
    )


def _faults_of_shard(database: EmbeddingDatabase, number: int, shard: Shard) -> Iterator[str]:
    """What is wrong with files that are as they were written."""
    try:
        embeddings, norms = database._map_shard(number)
        name = shard.file("vectors")
        if rows_digest(embeddings) != shard.digest:
            yield f"{name} does not hold the rows it should"
        blocks = zip(embeddings.split(BLOCK), norms.split(BLOCK), strict=True)
        if not all(_fit(*block) for block in blocks):
            yield f"{name} holds values that are not finite, or norms of other rows"
        if (small := shard.file("thumbnails")) is not None:
            thumbnails = Thumbnails(database._here(small), shard.rows)
            ends = thumbnails.offsets
            if (
                int(ends[0])
                or int(ends[-1]) != len(thumbnails.data)
                or bool((ends.diff() < 0).any())
            ):
                yield f"{small} holds pictures that lie outside of it"
        database._records.read(number)
    except (ValueError, OSError) as error:
        yield str(error)


def _fit(embeddings: Tensor, norms: Tensor) -> bool:
    return bool(embeddings.isfinite().all()) and torch.allclose(
        row_norms(embeddings), norms, rtol=1e-4, atol=1e-7
    )
