"""A database on disk: opened in a moment whatever its size, read by pages, checked by hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.fingerprint import file_digest, rows_digest, rows_hash
from retrodiff.databases.images import read_image, to_float
from retrodiff.databases.manifest import BUILD, MANIFEST, Manifest
from retrodiff.databases.searchable import Searchable, show
from retrodiff.databases.shards import map_tensors
from retrodiff.files import writing
from retrodiff.indexes import (
    Exact,
    Recall,
    Recipe,
    Vectors,
    load_index,
    recall_of,
    save_index,
    saved_index,
)
from retrodiff.indexes.recipe import EXACT_ROWS
from retrodiff.interfaces import Index, Record

TARGET = 0.95
"""Recall that an index must have been measured at to be chosen automatically."""


class EmbeddingDatabase(Searchable):
    """Rows of a folder made by `build_database`; use `open_database` to get one.

    Args:
        path: the folder.
        manifest: its table of contents.
        root: folder that the records' files are relative to, if it has moved since the build.
    """

    def __init__(self, path: Path, manifest: Manifest, root: str | Path | None = None):
        self.path, self.manifest = path, manifest
        self.root = None if root is None else Path(root)
        parts, norms = [], []
        for shard in manifest.shards:
            tensors = map_tensors(path / str(shard.file("vectors")))
            parts.append(tensors["embeddings"])
            norms.append(tensors["norms"])
        if not parts:
            parts, norms = [torch.empty(0, manifest.fingerprint.dim)], [torch.empty(0)]
        self.hidden: Tensor | None = None
        if manifest.deleted:
            self.hidden = map_tensors(path / manifest.deleted["file"])["rows"]
        digest = rows_hash((shard.digest for shard in manifest.shards), self.hidden)
        super().__init__(Vectors(parts, norms), replace(manifest.fingerprint, rows=digest))
        self.recipe: Recipe = Exact()
        self.recall: Recall | None = None
        starts = torch.tensor([0, *(shard.rows for shard in manifest.shards)])
        self._starts = starts.cumsum(0)
        self._records_of = lru_cache(4)(self._read_records)
        self._thumbnails_of = lru_cache(64)(map_tensors)
        self._columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.vectors) - (0 if self.hidden is None else len(self.hidden))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        if self._columns is None:
            self._columns = tuple(self._schema().names)
        return self._columns

    def records(self, indices: Tensor) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        places = self._places(indices)
        found: list[Record] = [{}] * len(places)
        for i in sorted(range(len(places)), key=places.__getitem__):  # each shard is read once
            shard, row = places[i]
            table = self._records_of(shard)
            found[i] = {name: table[name][row].as_py() for name in table.column_names}
        return found

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        import pyarrow as pa

        schema = self._schema()
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        tables = [self._read_records(i, schema) for i in range(len(self.manifest.shards))]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        if self.hidden is not None:
            table = table.take(self.stored(torch.arange(len(self))).numpy())
        return table

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        [(shard, row)] = self._places(torch.tensor([index]))
        name = self.manifest.shards[shard].file("thumbnails")
        if name is None:
            source = self.manifest.sources[self.manifest.shards[shard].source]
            return show(self.records(torch.tensor([index]))[0], self.root or source.get("root"))
        packed = self._thumbnails_of(self.path / name)
        start, end = packed["offsets"][row : row + 2].tolist()
        return to_float(read_image(packed["bytes"][start:end].numpy().tobytes()))

    def stored(self, rows: Tensor) -> Tensor:
        """Row numbers (n,) here -> row numbers (n,) among the stored vectors."""
        if self.hidden is None:
            return rows
        # The i-th visible row lies behind as many deleted rows as have at most i visible before.
        before = self.hidden - torch.arange(len(self.hidden))
        return rows + torch.searchsorted(before, rows, right=True)

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.hidden is None:
            return self.index.search(queries, k)
        similarity, found = self._find_visible(queries, k, self.hidden)
        visible = found - torch.searchsorted(self.hidden, found.cpu()).to(found.device)
        return similarity, visible

    def _find_visible(self, queries: Tensor, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        exact = Exact().build(self.vectors)
        if self.recipe.name == "exact":
            return exact.search(queries, k, hidden)
        wide = min(2 * k + 32, len(self.vectors))
        similarity, found = self.index.search(queries, wide)
        seen = ~torch.isin(found, hidden.to(found.device))
        if int(seen.sum(1).min()) < k:
            return exact.search(queries, k, hidden)
        first = seen.long().sort(dim=1, descending=True, stable=True).indices[:, :k]
        return similarity.gather(1, first), found.gather(1, first)

    def with_index(self, recipe: Recipe, index: Index, recall: Recall | None) -> EmbeddingDatabase:
        """The same rows, searched by another index."""
        other = EmbeddingDatabase(self.path, self.manifest, self.root)
        other.recipe, other.index, other.recall = recipe, index, recall
        return other

    def build_index(
        self, recipe: Recipe, *, k: int = 20, progress: bool = True, save: bool = True
    ) -> EmbeddingDatabase:
        """Builds an index over the rows, measures its recall@k on them, and saves it beside them.

        Returns:
            The same database, searched by the new index.
        """
        index = recipe.build(self.vectors, progress)
        recall = recall_of(index, self.vectors, k)
        if save and recipe.name != "exact":
            folder = self.path / "indexes" / recipe.name
            with writing(self.path):
                save_index(index, recipe, folder, self._stored_hash(), recall)
            index, _, _ = load_index(folder, self.vectors, self._stored_hash())
        return self.with_index(recipe, index, recall)

    def saved_indexes(self) -> dict[str, tuple[Recipe, Recall]]:
        """The indexes saved beside these very rows."""
        found = {}
        for about in sorted(self.path.glob("indexes/*/index.json")):
            recipe, recall, rows = saved_index(about.parent)
            if rows == self._stored_hash():
                found[recipe.name] = (recipe, recall)
        return found

    def open_index(self, name: str) -> EmbeddingDatabase:
        """The same database, searched by an index saved beside it; refused if of other rows."""
        if name == "exact":
            return self.with_index(Exact(), Exact().build(self.vectors), None)
        folder = self.path / "indexes" / name
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(
                f"{self.path} has no index {name!r}: build it with build_index, or "
                f"`retrodiff database index {self.path} {name}`"
            )
        index, recipe, recall = load_index(folder, self.vectors, self._stored_hash())
        return self.with_index(recipe, index, recall)

    def verify(self) -> list[str]:
        """What is wrong with the files, in words; empty if every byte is as it was written."""
        wrong = []
        files = {
            name: about for shard in self.manifest.shards for name, about in shard.files.items()
        }
        if self.manifest.deleted:
            files[self.manifest.deleted["file"]] = self.manifest.deleted
        for name, about in files.items():
            path = self.path / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != about["bytes"]:
                wrong.append(f"{name} has {path.stat().st_size} bytes, expected {about['bytes']}")
            elif file_digest(path) != about["sha256"]:
                wrong.append(f"{name} has changed since it was written")
        for shard, part in zip(self.manifest.shards, self.vectors.parts, strict=False):
            if not wrong and rows_digest(part) != shard.digest:
                wrong.append(f"{shard.file('vectors')} does not hold the rows it should")
        return wrong

    def _stored_hash(self) -> str:
        """Hash of the stored rows, deleted ones among them: what an index is built from."""
        return rows_hash(shard.digest for shard in self.manifest.shards)

    def _places(self, indices: Tensor) -> list[tuple[int, int]]:
        """Row numbers (n,) -> shard, and row in it."""
        rows = self.stored(self._checked(indices))
        shards = torch.searchsorted(self._starts, rows, right=True) - 1
        return list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))

    def _schema(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = [self.path / str(shard.file("records")) for shard in self.manifest.shards]
        schemas = [pq.read_schema(file).remove_metadata() for file in files]
        return pa.unify_schemas(schemas, promote_options="permissive")

    def _read_records(self, shard: int, schema: Any = None) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.path / str(self.manifest.shards[shard].file("records"))
        if schema is None:
            return pq.read_table(file)
        has = pq.read_schema(file).names
        table = pq.read_table(file, columns=[name for name in schema.names if name in has])
        arrays = [
            table[field.name].cast(field.type)
            if field.name in has
            else pa.nulls(len(table), field.type)
            for field in schema
        ]
        return pa.table(arrays, schema=schema)


def open_database(
    path: str | Path,
    index: str | Recipe | None = None,
    *,
    root: str | Path | None = None,
) -> EmbeddingDatabase:
    """Opens a database folder; nothing is read but its table of contents.

    Args:
        path: the folder.
        index: name of a saved index, ``exact``, or a recipe (taken from beside the rows if it was
            saved there, else built and saved). None: exact, except that above a million rows on a
            CPU the saved index of the highest measured recall is taken, if that is 0.95 or more.
        root: folder that the records' files are relative to, if it has moved since the build.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if unfinished(path.with_name(path.name + ".partial")):
            raise FileNotFoundError(f"the build of {path} is unfinished: resume it (--resume)")
        raise FileNotFoundError(f"{path} is not a database: it holds no {MANIFEST}")
    manifest = Manifest.read(path / MANIFEST)
    _check_sizes(path, manifest)
    database = EmbeddingDatabase(path, manifest, root)
    if index is None:
        saved = database.saved_indexes() if len(database) > EXACT_ROWS else {}
        good = [
            (recall.value, name) for name, (_, recall) in saved.items() if recall.value >= TARGET
        ]
        return database.open_index(max(good)[1]) if good else database
    if isinstance(index, str):
        return database.open_index(index)
    if index.name == "exact" or database.saved_indexes().get(index.name, (None,))[0] == index:
        return database.open_index(index.name)
    return database.build_index(index)


def unfinished(folder: Path) -> bool:
    """Whether a folder holds a build that was killed and can be resumed."""
    return (folder / BUILD).is_file() or (folder / MANIFEST).is_file()


def _check_sizes(path: Path, manifest: Manifest) -> None:
    """A cheap look for files that are missing or cut short; `verify` looks at every byte."""
    for shard in manifest.shards:
        for name, about in shard.files.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{path / name} is missing: restore it, or build again"
                ) from None
            if size != about["bytes"]:
                raise ValueError(
                    f"{path / name} has {size} bytes, its manifest says {about['bytes']}: "
                    "restore it, or build again"
                )
