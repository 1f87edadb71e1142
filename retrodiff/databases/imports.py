"""Makes databases from embeddings that exist already: arrays, npy files, and published layouts.

Known are the folders of clip-retrieval (``img_emb`` and ``metadata``) and of the databases released
with Blattmann et al. 2022 (``{rows}x{dim}-part_{i}.npz``). Parts are joined in the order of the
numbers in their names.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retrodiff.databases.fingerprint import SHARD_ROWS
from retrodiff.databases.ingest import check_place, clear, move
from retrodiff.databases.manifest import MANIFEST, Manifest, Shard
from retrodiff.databases.shards import ShardBuffer
from retrodiff.databases.sources import natural
from retrodiff.databases.store import EmbeddingDatabase, open_database
from retrodiff.databases.views import storable
from retrodiff.files import make_folder, writing
from retrodiff.interfaces import Fingerprint
from retrodiff.progress import progress_bar


class Part(NamedTuple):
    """Some rows: embeddings (n, d), and n records or a pyarrow table of n rows; None: numbers."""

    embeddings: np.ndarray
    records: Sequence[Mapping[str, Any]] | Any | None = None
    name: str = "part"


def import_embeddings(
    path: str | Path,
    parts: Iterable[Part],
    fingerprint: Fingerprint,
    *,
    root: str | Path | None = None,
    shard_rows: int = SHARD_ROWS,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingDatabase:
    """Writes embeddings that were computed elsewhere into a database folder.

    Args:
        path: folder to be made.
        parts: as given by `npy_parts`, `clip_retrieval_parts`, `rdm_parts`, or a list of `Part`.
        fingerprint: of the encoder that made them; only the user can know it.
        root: folder that the records' files are relative to.
        shard_rows: rows per file.
        overwrite: replace what is there, once the new one is done.
        progress: show a bar.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    check_place(path, overwrite=overwrite)
    make_folder(partial)
    source: dict[str, Any] = {"kind": "embeddings"}
    if root is not None:
        source["root"] = str(Path(root).resolve())
    bar = progress_bar(None, "import", progress, iterable=parts, unit="part")
    with writing(partial):
        clear(partial)
        try:
            shards = tuple(_shards(partial, bar, fingerprint, shard_rows))
        except ValueError:
            shutil.rmtree(partial)
            raise
        settings = {"shard_rows": shard_rows}
        plan = Manifest(replace(fingerprint, rows=""), shards, settings, (source,))
        plan.write(partial / MANIFEST)
        move(partial, path)
    return open_database(path)


def _shards(
    folder: Path, parts: Iterable[Part], fingerprint: Fingerprint, shard_rows: int
) -> Iterator[Shard]:
    buffer, number, row = ShardBuffer(shard_rows, fingerprint.dim), 0, 0
    for part in parts:
        _check_part(part, fingerprint)
        for start, end in _pieces(len(part.embeddings), buffer):
            piece = part.embeddings[start:end]
            # A copy of one's own: mapped files are read-only, and may be of the other byte order.
            embeddings = torch.from_numpy(piece.astype(piece.dtype.newbyteorder("=")))

            def name(i: int, part: Part = part, start: int = start) -> str:
                return f"{part.name}, row {start + i}"

            stored, norms = storable(embeddings, fingerprint.encoder, name)
            buffer.add(stored, norms, _records(part, start, end, row))
            row += end - start
            if buffer.room == 0:
                yield buffer.write(folder, number, (0, 0))
                number += 1
    if buffer.count:
        yield buffer.write(folder, number, (0, 0))
    elif not row:
        raise ValueError("no embeddings: give at least one row")


def npy_parts(
    files: Sequence[str | Path], metadata: Sequence[str | Path] | None = None
) -> Iterator[Part]:
    """Embeddings (n, d) of npy files, memory-mapped, with a parquet file for each if there is."""
    import pyarrow.parquet as pq

    if metadata is not None and len(metadata) != len(files):
        raise ValueError(f"{len(files)} npy files, but {len(metadata)} of metadata: give one each")
    for i, file in enumerate(files):
        records = None if metadata is None else pq.read_table(metadata[i])
        yield Part(np.load(file, mmap_mode="r", allow_pickle=False), records, str(file))


def clip_retrieval_parts(folder: str | Path) -> Iterator[Part]:
    """What clip-retrieval wrote; its vectors are of unit norm, the raw norms are lost.

    Give `import_embeddings` a fingerprint with ``scale="unit"``. The column ``image_path`` becomes
    ``file``.
    """
    folder = Path(folder)
    arrays = _numbered(folder / "img_emb", ".npy")
    tables = _numbered(folder / "metadata", ".parquet")
    for part in npy_parts(arrays, tables or None):
        if part.records is not None and not isinstance(part.records, Sequence):
            names = ["file" if n == "image_path" else n for n in part.records.column_names]
            part = part._replace(records=part.records.rename_columns(names))
        yield part


def rdm_parts(folder: str | Path) -> Iterator[Part]:
    """The parts of a database released with Blattmann et al. 2022: ids and boxes become columns."""
    import pyarrow as pa

    for file in _numbered(Path(folder), ".npz"):
        with np.load(file, allow_pickle=False) as arrays:
            columns = {}
            if "img_id" in arrays:
                columns["image_id"] = pa.array(arrays["img_id"].tolist())
            if "patch_coords" in arrays:
                columns["box"] = pa.array(arrays["patch_coords"].tolist())
            yield Part(arrays["embedding"], pa.table(columns) if columns else None, str(file))


def _numbered(folder: Path, ending: str) -> list[Path]:
    files = sorted(folder.glob(f"*{ending}"), key=lambda file: natural(file.name))
    if not files and ending != ".parquet":
        raise FileNotFoundError(f"{folder} holds no {ending} files")
    return files


def _check_part(part: Part, fingerprint: Fingerprint) -> None:
    shape = part.embeddings.shape
    if len(shape) != 2 or shape[1] != fingerprint.dim:
        raise ValueError(
            f"{part.name} holds embeddings of shape {shape}, fingerprint.dim={fingerprint.dim}: "
            "give the fingerprint of the encoder that made them"
        )
    if part.records is not None and len(part.records) != shape[0]:
        raise ValueError(f"{part.name}: {shape[0]} embeddings, but {len(part.records)} records")


def _pieces(rows: int, buffer: ShardBuffer) -> Iterator[tuple[int, int]]:
    """Start and end of pieces that fit into the buffer; the caller empties it when it is full."""
    start = 0
    while start < rows:
        end = min(start + buffer.room, rows)
        yield start, end
        start = end


def _records(part: Part, start: int, end: int, row: int) -> Any:
    if part.records is None:
        import pyarrow as pa

        return pa.table({"number": pa.array(np.arange(row, row + end - start))})
    if isinstance(part.records, Sequence):
        return part.records[start:end]
    return part.records.slice(start, end - start)
