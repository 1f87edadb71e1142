"""Makes databases from embeddings that exist already, without loading them.

Shards are hashed and written beside the filling of the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.build.work import Work, make_database
from retrodiff.databases.digests import SHARD_ROWS
from retrodiff.databases.manifest import Manifest, Shard
from retrodiff.databases.row_files import ShardBuffer
from retrodiff.databases.sources.folders import first_duplicate, plain_id, state_of_files
from retrodiff.databases.storable import storable
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.disk.files import given
from retrodiff.interfaces import Fingerprint
from retrodiff.numbers import whole
from retrodiff.progress import progress_bar

PIECE = 8_192
"""Rows that are converted at a time."""

AHEAD = 2
"""Shards that are being written while the next one is filled."""


class Rows(Protocol):
    """Embeddings (n, d) that give an array for a slice of rows; asked for in ascending order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Part(NamedTuple):
    """Rows to import: embeddings and their records.

    Attributes:
        embeddings: (n, d), an array or something that reads a slice of rows when it is asked.
        records: n mappings, a pyarrow table of n rows, or ``(first, end) -> table``; None: the
            records are the numbers of the rows.
        name: what errors call it.

    Examples:
        >>> import numpy as np
        >>> from retrodiff import Fingerprint
        >>> from retrodiff.databases import Part, import_embeddings
        >>> rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        >>> part = Part(rows, [{"file": f"{i}.png"} for i in range(5)])
        >>> made_by = Fingerprint(encoder="mine", weights="", preprocessing="none", dim=8)
        >>> database = import_embeddings("imported.rdb", [part], made_by, progress=False)
        >>> len(database)
        5
    """

    embeddings: np.ndarray | Rows
    records: Sequence[Mapping[str, Any]] | Callable[[int, int], Any] | Any | None = None
    name: str = "part"


def import_embeddings(
    path: str | Path,
    parts: Iterable[Part],
    fingerprint: Fingerprint,
    *,
    root: str | Path | None = None,
    shard_rows: int = SHARD_ROWS,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingDatabase:
    """Writes embeddings that were computed elsewhere into a database folder.

    Args:
        path: folder to be made.
        parts: as given by `npy_parts`, `clip_retrieval_parts`, `rdm_parts`, or a list of `Part`.
        fingerprint: of the encoder that made them; only the user can know it. ``scale="unit"`` is
            checked against the rows.
        root: folder that the records' files are relative to.
        shard_rows: rows per file; a killed import loses at most the shards it was writing.
        resume: continue an import of the same parts that was killed; a finished one is opened.
        overwrite: replace what is there, once the new one is done.
        progress: show a bar.

    Raises:
        ValueError: a part is of another width than the fingerprint, its records are too many or too
            few, it holds what float16 cannot, or two rows share an ``id``.
    """
    source: dict[str, Any] = {"kind": "embeddings"}
    total = state = None
    if isinstance(parts, Sequence):
        total = sum(part.embeddings.shape[0] for part in parts)
        names = [Path(part.name).name for part in parts]
        state = state_of_files(file for part in parts if (file := Path(part.name)).is_file())
        source |= {"parts": len(parts), "rows": total, "first": names[:1], "last": names[-1:]}
    if root is not None:
        source["root"] = str(given(root).resolve())
    settings = {"shard_rows": whole("shard_rows", shard_rows)}
    plan = Manifest(replace(fingerprint, rows=""), settings=settings, sources=(source,))

    def fill(work: Work) -> None:
        done = work.manifest.rows
        bar = progress_bar(total, "import", progress, initial=done, unit="row", unit_scale=True)
        with bar, ThreadPoolExecutor(AHEAD) as beside:
            writer = _Writer(work, fingerprint.dim, beside)
            for piece in _pieces(parts, fingerprint, work.next, done, lambda: writer.buffer.room):
                writer.add(*piece)
                bar.update(len(piece[0]))
            writer.finish()
        if not work.manifest.shards:
            raise ValueError("no embeddings: give at least one row")
        _check_ids(work)

    return make_database(path, plan, fill, resume=resume, overwrite=overwrite, state=state)


class _Writer:
    """Hashes and writes full shards beside the filling of the next one; records them in order."""

    def __init__(self, work: Work, dim: int, beside: Executor):
        rows = work.manifest.settings["shard_rows"]
        self.work, self.beside = work, beside
        self.free = [ShardBuffer(rows, dim) for _ in range(AHEAD + 1)]
        self.buffer = self.free.pop()
        self.number = len(work.manifest.shards)
        self.waiting: deque[tuple[Future[Shard], ShardBuffer]] = deque()
        self.at = work.next

    def add(self, stored: Tensor, norms: Tensor, records: Any, at: tuple[int, int]) -> None:
        """Takes rows that fit, and where the parts go on behind them."""
        self.buffer.add(stored, norms, records)
        self.at = at
        if self.buffer.room == 0:
            self._write()

    def finish(self) -> None:
        """Writes what is left and waits for all."""
        if self.buffer.count:
            self._write()
        while self.waiting:
            self._record()

    def _write(self) -> None:
        job = self.beside.submit(self.buffer.write, self.work.folder, self.number, self.at)
        self.waiting.append((job, self.buffer))
        self.number += 1
        if not self.free:
            self._record()
        self.buffer = self.free.pop()

    def _record(self) -> None:
        job, buffer = self.waiting.popleft()
        self.work.record(job.result())
        self.free.append(buffer)


def _pieces(
    parts: Iterable[Part],
    fingerprint: Fingerprint,
    start: tuple[int, int],
    row: int,
    room: Callable[[], int],
) -> Iterator[tuple[Tensor, Tensor, Any, tuple[int, int]]]:
    """Stored rows, norms, records and what comes next, never more rows than there is room for."""
    for number, part in enumerate(parts):
        if number < start[0]:
            continue
        _check_part(part, fingerprint)
        rows = part.embeddings.shape[0]
        first = start[1] if number == start[0] else 0
        while first < rows:
            last = min(first + min(PIECE, room()), rows)
            piece = part.embeddings[first:last]
            if piece.dtype.kind not in "fiu" or piece.dtype.itemsize > 8:
                raise ValueError(f"{part.name} holds {piece.dtype}, expected numbers: give floats")
            if not piece.dtype.isnative or not piece.flags.writeable:
                piece = piece.astype(piece.dtype.newbyteorder("="))

            def name(i: int, part: Part = part, first: int = first) -> str:
                return f"{part.name}, row {first + i}"

            stored, norms = storable(torch.from_numpy(piece), fingerprint.encoder, name)
            if fingerprint.scale == "unit":
                _check_unit(norms, name)
            at = (number, last) if last < rows else (number + 1, 0)
            yield stored, norms, _records(part, first, last, row), at
            row += last - first
            first = last


def _check_part(part: Part, fingerprint: Fingerprint) -> None:
    shape = part.embeddings.shape
    if len(shape) != 2 or shape[1] != fingerprint.dim:
        raise ValueError(
            f"{part.name} holds embeddings of shape {shape}, fingerprint.dim={fingerprint.dim}: "
            "give the fingerprint of the encoder that made them"
        )
    records: Any = part.records
    if hasattr(records, "__len__") and len(records) != shape[0]:
        raise ValueError(f"{part.name}: {shape[0]} embeddings, but {len(records)} records")


def _check_unit(norms: Tensor, name: Callable[[int], str]) -> None:
    off = (norms - 1).abs() > 0.02  # float16 and most normalizations stay within a hundredth
    if bool(off.any()):
        row = int(off.nonzero()[0, 0])
        raise ValueError(
            f"{name(row)} has norm {float(norms[row]):.4g}, but the fingerprint says scale='unit': "
            "say scale='raw', or divide the embeddings by their norms"
        )


def _records(part: Part, start: int, end: int, row: int) -> Any:
    import pyarrow as pa

    records: Any = part.records
    if records is None:
        return pa.table({"number": pa.array(np.arange(row, row + end - start))})
    if isinstance(records, pa.Table):
        return records.slice(start, end - start)
    return records(start, end) if callable(records) else records[start:end]


def _check_ids(work: Work) -> None:
    """Refuses rows that share an ``id``, reading nothing but that column."""
    import pyarrow.parquet as pq

    files = [work.folder / str(shard.file("records")) for shard in work.manifest.shards]

    def ids() -> Iterator[Any]:
        for file in files:
            if "id" in pq.read_schema(file).names:
                yield from map(plain_id, pq.read_table(file, columns=["id"])["id"].to_pylist())
            else:
                yield from [None] * pq.read_metadata(file).num_rows

    if (found := first_duplicate(ids)) is not None:
        value, first, second = found
        raise ValueError(
            f"rows {first} and {second} both have id {value!r}: give every row an id of its own, "
            "or rename the column, and start anew (--overwrite)"
        )
