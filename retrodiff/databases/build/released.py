"""Reads embeddings from npy files, clip-retrieval and the paper's release, in row order.

Known are npy files, the folders of clip-retrieval (``img_emb`` and ``metadata``) and those released
with Blattmann et al. 2022: ``{rows}x{dim}-part_{i}.npz``, and a pickle ``nn_memory`` of how often
each row is a neighbor. Parts are joined in the order of the numbers in their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.build.imports import Part
from retrodiff.databases.build.readers import NpyArray, NpzArray, ParquetRows, npz_names
from retrodiff.disk.files import given
from retrodiff.disk.unpickling import read_plain_pickle
from retrodiff.interfaces import Database

ROW_BYTES = 2**16
"""Bytes of the longest id or box."""


def npy_parts(
    files: Sequence[str | Path], metadata: Sequence[str | Path] | None = None
) -> list[Part]:
    """Embeddings (n, d) of npy files, memory-mapped, with a parquet file for each if there is.

    Args:
        files: npy files, in the order that their rows shall have.
        metadata: a parquet file with the records of each; None: the records are row numbers.

    Raises:
        ValueError: numbers of files and of metadata differ.
    """
    if metadata is not None and len(metadata) != len(files):
        raise ValueError(f"{len(files)} npy files, but {len(metadata)} of metadata: give one each")
    tables = [None] * len(files) if metadata is None else [ParquetRows(given(m)) for m in metadata]
    return _of_one_width(
        [Part(NpyArray(given(f)), t, str(given(f))) for f, t in zip(files, tables, strict=True)]
    )


def clip_retrieval_parts(folder: str | Path) -> list[Part]:
    """Embeddings of a clip-retrieval folder; they have unit norm, the raw norms are lost.

    Give `import_embeddings` a fingerprint with ``scale="unit"``. The column ``image_path`` becomes
    ``file``.

    Raises:
        ValueError: an embedding file lacks its parquet file, or the reverse.
        FileNotFoundError: there is no such folder.
    """
    folder = given(folder)
    arrays = series(folder / "img_emb", ".npy")
    tables: dict[int, Path] = {}
    if (folder / "metadata").is_dir() and any((folder / "metadata").glob("*.parquet")):
        tables = series(folder / "metadata", ".parquet")
        if tables.keys() != arrays.keys():
            alone = sorted(tables.keys() ^ arrays.keys())[0]
            has, lacks = ("img_emb", "metadata") if alone in arrays else ("metadata", "img_emb")
            raise ValueError(
                f"{folder / has} has a part {alone}, {folder / lacks} has none: restore it, or "
                "take its partner away"
            )
    names = {"image_path": "file"}
    return _of_one_width(
        [
            Part(NpyArray(file), ParquetRows(tables[i], names) if tables else None, str(file))
            for i, file in arrays.items()
        ]
    )


def rdm_parts(folder: str | Path) -> list[Part]:
    """The parts of a database released with Blattmann et al. 2022: ids and boxes become columns.

    Raises:
        ValueError: a part is missing, or its ids or boxes do not fit its embeddings.
        FileNotFoundError: there is no such folder.
    """
    parts = []
    for file in series(given(folder), ".npz").values():
        columns = {
            name: NpzArray(file, array)
            for array, name in (("img_id", "image_id"), ("patch_coords", "box"))
            if array in npz_names(file)
        }
        embeddings = NpzArray(file, "embedding")
        for array in columns.values():
            row = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            if row > ROW_BYTES or len(array.shape) > 2:
                raise ValueError(
                    f"{file}: {array.name} has the shape {array.shape} of {array.dtype}, which is "
                    "no column of ids or boxes"
                )
            if len(array) != len(embeddings):
                have = f"{len(embeddings)} embeddings, but {len(array)} {array.name}"
                raise ValueError(f"{file}: {have}")
        parts.append(Part(embeddings, _Columns(columns) if columns else None, str(file)))
    return _of_one_width(parts)


def nn_memory_counts(path: str | Path, database: Database) -> tuple[Tensor, Tensor]:
    """How often each row of a released database is a neighbor of a training image.

    ``NeighborCounts(*nn_memory_counts(path, database), database.fingerprint)`` is the proposal
    distribution of the paper's models.

    Args:
        path: the pickle ``nn_memory``. It is read without running anything in it.
        database: the one that its row numbers are of, imported whole.

    Returns:
        The rows (n,) that are ever a neighbor, ascending, and their counts (n,), both int64.

    Raises:
        ValueError: the pickle is no ``nn_memory``, or is of another database.
    """
    with given(path).open("rb") as file:
        content = read_plain_pickle(file, str(path))
    counts = content.get("id_count") if isinstance(content, dict) else None
    if not isinstance(counts, dict) or not counts:
        raise ValueError(f"{path} is no nn_memory: it holds no dictionary id_count of counts by id")
    rows, times = _integers(counts.keys(), path), _integers(counts.values(), path)
    order = np.argsort(rows)
    rows, times = rows[order], times[order]
    if rows[0] < 0 or rows[-1] >= len(database):
        raise ValueError(
            f"{path} counts row {rows[0] if rows[0] < 0 else rows[-1]}, the database has "
            f"{len(database)} rows: give the database it was made for, imported whole"
        )
    kept = times > 0
    listed = content.get("nn_memory")
    if listed is not None and not np.array_equal(
        np.sort(_integers(np.asarray(listed).reshape(-1).tolist(), path)), rows[kept]
    ):
        raise ValueError(f"{path} lists other rows in nn_memory than it counts in id_count")
    return torch.from_numpy(rows[kept]), torch.from_numpy(times[kept])


def series(folder: Path, ending: str) -> dict[int, Path]:
    """The numbered files of a folder by the last number of their names; refused if one is missing.

    Numbers begin with 0 or 1.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the folder of the {ending} files")
    files: dict[int, Path] = {}
    for file in sorted(folder.glob(f"*{ending}")):
        found = re.findall(r"\d+", file.stem)
        if not found:
            raise ValueError(f"{file} has no number in its name: its place among the parts is open")
        other = files.setdefault(int(found[-1]), file)
        if other != file:
            raise ValueError(f"{other} and {file.name} are both part {found[-1]}: keep one of them")
    if not files:
        raise FileNotFoundError(f"{folder} holds no {ending} files")
    first, last = min(1, *files), max(files)
    missing = [i for i in range(first, last) if i not in files]
    if missing:
        like = files[last].name
        names = [re.sub(r"\d+(?=\D*$)", str(i), like.removesuffix(ending)) for i in missing]
        named = ", ".join(f"{name}{ending}" for name in names[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(
            f"{folder} lacks {named}{more}, though it goes to {like}: rows would be lost, fetch "
            "what is missing"
        )
    return dict(sorted(files.items()))


class _Columns:
    """Arrays of one npz file as a table of records."""

    def __init__(self, arrays: dict[str, NpzArray]):
        self.arrays = arrays

    def __call__(self, start: int, end: int) -> Any:
        import pyarrow as pa

        columns = {}
        for name, array in self.arrays.items():
            values = array[start:end]
            if values.dtype.kind == "S":
                values = np.char.decode(values, "utf-8", "replace")
            if name == "box" and values.dtype.kind == "f":
                values = np.rint(values).astype(np.int64)
            if values.ndim == 2:
                offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
                columns[name] = pa.ListArray.from_arrays(offsets, values.reshape(-1))
            else:
                columns[name] = pa.array(values.tolist() if values.dtype.hasobject else values)
        return pa.table(columns)


def _of_one_width(parts: list[Part]) -> list[Part]:
    """The parts, refused if their embeddings are of different widths or their records too few."""
    for part in parts:
        shape, first = part.embeddings.shape, parts[0].embeddings.shape
        if len(shape) != 2 or shape[1:] != first[1:]:
            raise ValueError(
                f"{parts[0].name} holds embeddings of shape {first}, {part.name} of shape {shape}: "
                "the parts of a database have one width"
            )
    return parts


def _integers(values: Iterable[Any], path: str | Path) -> np.ndarray:
    try:
        return np.fromiter(map(int, values), np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path} holds ids or counts that are no whole numbers") from None
