"""Neighbor tables: row numbers of many queries' neighbors, computed before training.

In memory, or in a file that is mapped: one for a training set of any size, that a killed process
does not lose and that refuses any other database.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.disk.files import given, place
from retrodiff.interfaces import Database, Query, Randomness, Retriever
from retrodiff.numbers import LARGEST_SEED, whole
from retrodiff.retrieval.table import map_table, tabulated


def neighbor_table(
    queries: Query,
    database: Database,
    k: int,
    retriever: Retriever,
    *,
    path: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    batch_size: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Row numbers (n, k) of every query's neighbors: int32, or int64 from 2³¹ rows on.

    Args:
        queries: n embeddings (n, d), with ids where they are rows of the database themselves; or
            (n, r, d) for r regions, which gives (n, r, k).
        database: where to look.
        k: neighbors per query.
        retriever: which ones.
        path: file that receives them batch by batch, a safetensors file; the result is then mapped
            from it and takes no memory. None: in memory.
        resume: continue a file that was begun, to the same bytes; a whole one is opened.
        overwrite: replace what is there.
        batch_size: queries per search; the result does not depend on it.
        seed: of retrievers that draw; every query draws from its own randomness.
        progress: show a bar.

    Raises:
        ValueError: the file that is there is of other queries, another database, k or retriever.
    """
    k, batch_size = whole("k", k), whole("batch_size", batch_size)
    seed = whole("seed", seed, 0, LARGEST_SEED)

    def rows(start: int, stop: int) -> Tensor:
        generator = Randomness.of(seed, range(start, stop), "retrieval")
        query = dataclasses.replace(queries.rows(slice(start, stop)), generator=generator)
        return retriever.retrieve(query, database, k).indices

    about: dict[str, object] = {}
    if path is not None:
        about = {
            **_of_database(database),
            "queries": queries_hash(queries),
            # An address in memory is not part of what a retriever does.
            "retriever": re.sub(r" at 0x[0-9a-f]+", "", repr(retriever)),
            "index": getattr(database, "recipe", ""),
            "k": k,
            "seed": seed,
        }
    return tabulated(
        rows,
        (*queries.embedding.shape[:-1], k),
        torch.int32 if len(database) < 2**31 else torch.int64,
        batch_size=batch_size,
        what="neighbors",
        progress=progress,
        path=None if path is None else place(path),
        about=about,
        resume=resume,
        overwrite=overwrite,
    )


def open_neighbor_table(path: str | Path, database: Database, k: int | None = None) -> Tensor:
    """Opens the row numbers (n, k) of a file written by `neighbor_table`, memory-mapped.

    Args:
        path: the file.
        database: the one that the rows are of; any other is refused.
        k: neighbors per query, the first of those in the file; None: all.

    Raises:
        ValueError: the table is of another database, or keeps fewer neighbors.
    """
    table, about = map_table(given(path))
    for name, value in _of_database(database).items():
        if about.get(name) != str(value):
            raise ValueError(
                f"{path} is a table of another database, {name}={about.get(name)!r} against "
                f"{name}={str(value)!r}: open that one, or make the table again"
            )
    if k is not None and k > table.shape[-1]:
        raise ValueError(
            f"k={k} neighbors are wanted, but {path} keeps k={table.shape[-1]}: make it again"
        )
    return table if k is None else table[..., :k]


def queries_hash(queries: Query) -> str:
    """SHA-256 of embeddings and ids, whatever memory they lie in."""
    digest = hashlib.sha256(str(tuple(queries.embedding.shape)).encode())
    for part in queries.embedding.detach().split(4096):
        digest.update(part.float().cpu().contiguous().numpy().data)
    if queries.ids is not None:
        digest.update(queries.ids.to("cpu", torch.int64).contiguous().numpy().data)
    return digest.hexdigest()[:32]


def _of_database(database: Database) -> dict[str, object]:
    return {f"database.{name}": value for name, value in vars(database.fingerprint).items()}
