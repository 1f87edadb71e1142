"""A database on disk: opened in a moment whatever its size, read by pages, checked by hashes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.databases.digests import rows_hash
from retrodiff.databases.manifest import AGAIN, BUILD, MANIFEST, Manifest
from retrodiff.databases.record_files import RecordFiles
from retrodiff.databases.records import TEXT
from retrodiff.databases.row_files import Thumbnails, map_shard, read_deleted
from retrodiff.databases.searchable import Searchable, measure, show
from retrodiff.disk.files import REPLACED, given
from retrodiff.disk.hashed import check_file
from retrodiff.disk.locks import write_lock
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
from retrodiff.indexes.recipe import SavableIndex
from retrodiff.indexes.saved import check_index_place
from retrodiff.interfaces import Index, Record
from retrodiff.pictures.thumbnails import read_image, to_float
from retrodiff.text import printable


class EmbeddingDatabase(Searchable):
    """Rows of a folder made by `build_database`; use `open_database` to get one.

    Args:
        path: the folder.
        manifest: its table of contents.
        root: folder that the records' files are relative to, if it has moved since the build.

    Examples:
        >>> import torch
        >>> from retrodiff import Encoder, Fingerprint, build_database, open_database
        >>> from retrodiff.databases import Images
        >>> class MeanColor(Encoder):
        ...     dim = 3
        ...     fingerprint = Fingerprint(
        ...         encoder="mean-color", weights="", preprocessing="none", dim=3
        ...     )
        ...
        ...     def encode_image(self, images):
        ...         return images.float().mean((2, 3))
        >>> pictures = Images(torch.rand(6, 3, 8, 8) * 2 - 1)
        >>> built = build_database("colors.rdb", pictures, MeanColor(), progress=False)
        >>> database = open_database("colors.rdb")
        >>> len(database), database.columns, database.verify()
        (6, ('number',), [])
    """

    def __init__(self, path: Path, manifest: Manifest, root: str | Path | None = None):
        self.path, self.manifest = path, manifest
        self.root = None if root is None else given(root)
        self.hidden: Tensor | None = None
        if manifest.deleted:
            file = self._here(manifest.deleted["file"])
            self.hidden = read_deleted(file, manifest.deleted, manifest.rows)
        digest = rows_hash((shard.digest for shard in manifest.shards), self.hidden)
        super().__init__(self._mapped(), replace(manifest.fingerprint, rows=digest))
        self.recipe: Recipe = Exact()
        self.recall: Recall | None = None
        starts = torch.tensor([0, *(shard.rows for shard in manifest.shards)])
        self._starts = starts.cumsum(0)
        self._records = RecordFiles(
            manifest.shards, self._compared, manifest.settings.get(TEXT, ())
        )
        self._thumbnails_of = lru_cache(64)(Thumbnails)

    def __copy__(self) -> EmbeddingDatabase:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> Any:
        """Another process, such as a worker of a ``DataLoader``, opens the same rows again."""
        about = (type(self), self.address, self.fingerprint.rows, self.recipe, self.root)
        return _opened_again, about

    @classmethod
    def at(cls, address: str | Path, root: str | Path | None = None) -> EmbeddingDatabase:
        """The database at an address of its own kind, searched exactly; see `open_database`.

        Raises:
            FileNotFoundError: there is no database, or its build is unfinished.
        """
        path = given(address)
        if not (path / MANIFEST).is_file():
            if unfinished(path.with_name(path.name + ".partial")):
                raise FileNotFoundError(f"the build of {path} is unfinished: resume it (--resume)")
            raise FileNotFoundError(f"{path} is not a database: it holds no {MANIFEST}")
        manifest = Manifest.read(path / MANIFEST)
        manifest.check_sizes(path)
        return cls(path, manifest, root)

    def __len__(self) -> int:
        return len(self.vectors) - (0 if self.hidden is None else len(self.hidden))

    @property
    def address(self) -> str:
        """Where it lies: `open_database` opens these rows again with it."""
        return str(self.path)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return tuple(self._schema.names)

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        places = self._places(indices)
        found: list[Record] = [{}] * len(places)
        for i in sorted(range(len(places)), key=places.__getitem__):  # each shard is read once
            shard, row = places[i]
            table = self._records.recent(shard)
            found[i] = {name: table[name][row].as_py() for name in table.column_names}
        return found

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        import pyarrow as pa

        tables = list(self.tables(columns))
        return (
            pa.concat_tables(tables) if tables else self._records.schema_of(columns).empty_table()
        )

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The same as `table`, shard by shard."""
        import pyarrow as pa

        schema, start = self._records.schema_of(columns), 0
        for number, shard in enumerate(self.manifest.shards):
            table = self._records.read(number, schema)
            if self.hidden is not None:
                ends = torch.tensor([start, start + shard.rows])
                first, last = torch.searchsorted(self.hidden, ends).tolist()
                visible = torch.ones(shard.rows, dtype=torch.bool)
                visible[self.hidden[first:last] - start] = False
                table = table.filter(pa.array(visible.numpy()))
            yield table
            start += shard.rows

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        [(shard, row)] = self._places([index])
        name = self.manifest.shards[shard].file("thumbnails")
        if name is None:
            return show(self.records([index])[0], self._root_of(shard))
        rows = self.manifest.shards[shard].rows
        return to_float(read_image(self._thumbnails_of(self._here(name), rows)[row]))

    def original(self, index: int) -> Tensor:
        """The picture of a row from its own file, at full size: (3, h, w) in [-1, 1]."""
        [(shard, _)] = self._places([index])
        return show(self.records([index])[0], self._root_of(shard))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the original, from its file's header."""
        [(shard, _)] = self._places([index])
        return measure(self.records([index])[0], self._root_of(shard))

    def _root_of(self, shard: int) -> str | Path | None:
        """Where the pictures of a shard lie, if this user has named that folder himself."""
        root = self.manifest.sources[self.manifest.shards[shard].source].get("root")
        if self.root is None and root is not None and root not in self.manifest.roots:
            raise ValueError(
                f"the pictures lie in {printable(root)}, says the manifest of {self.address}, "
                "which was not written by you on this machine: open the database with "
                "root= that folder if you trust it"
            )
        return self.root or root

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
        index: Any = self.index
        if self.recipe.name == "exact":
            return index.search(queries, k, hidden)
        wide = min(2 * k + 32, len(self.vectors))
        similarity, found = index.search(queries, wide)
        seen = ~torch.isin(found, hidden.to(found.device))
        if int(seen.sum(1).min()) < k:
            return Exact().build(self.vectors).search(queries, k, hidden)
        first = seen.long().sort(dim=1, descending=True, stable=True).indices[:, :k]
        return similarity.gather(1, first), found.gather(1, first)

    def with_index(self, recipe: Recipe, index: Index, recall: Recall | None) -> EmbeddingDatabase:
        """The same rows, searched by another index."""
        other = copy.copy(self)
        other.recipe, other.index, other.recall = recipe, index, recall
        return other

    def build_index(
        self, recipe: Recipe, *, k: int = 20, progress: bool = True, save: bool = True
    ) -> EmbeddingDatabase:
        """Builds an index over the rows, measures its recall@k on them, and saves it beside them.

        Returns:
            The same database, searched by the new index.
        """
        if not save or recipe.name == "exact":
            index = recipe.build(self.vectors, progress)
            return self.with_index(recipe, index, recall_of(index, self.vectors, k))
        place = self._home() / "indexes"
        check_index_place(place / recipe.name)  # before the work
        try:
            with write_lock(self._home()):
                return self.build_index(recipe, k=k, progress=progress, save=False)._save_index()
        finally:
            with suppress(OSError):
                place.rmdir()  # if nothing was written into it

    def save_index(self) -> EmbeddingDatabase:
        """Saves the index that the database is searched by beside the rows; exact needs none.

        Returns:
            The same database, searched by the saved index.
        """
        if self.recipe.name == "exact":
            return self
        check_index_place(self._home() / "indexes" / self.recipe.name)
        with write_lock(self._home()):
            return self._save_index()

    def _save_index(self) -> EmbeddingDatabase:
        folder, rows = self._home() / "indexes" / self.recipe.name, self._stored_hash()
        assert self.recall is not None  # only exact search has none
        save_index(cast("SavableIndex", self.index), self.recipe, folder, rows, self.recall)
        return self.with_index(self.recipe, load_index(folder, self.vectors, rows)[0], self.recall)

    def saved_indexes(self) -> dict[str, tuple[Recipe, Recall]]:
        """The indexes saved beside these very rows."""
        found = {}
        for folder in self.index_folders().values():
            recipe, recall, rows = saved_index(folder)
            if rows == self._stored_hash():
                found[recipe.name] = (recipe, recall)
        return found

    def index_folders(self) -> dict[str, Path]:
        """Where the saved indexes lie, of these rows or of others."""
        found = sorted(self._home().glob("indexes/*/index.json"))
        return {about.parent.name: about.parent for about in found}

    def open_index(self, name: str) -> EmbeddingDatabase:
        """The same database, searched by an index saved beside it; refused if of other rows.

        Raises:
            FileNotFoundError: no index of that name is saved.
        """
        if name == "exact":
            return self.with_index(Exact(), Exact().build(self.vectors), None)
        folder = self.index_folders().get(name)
        if folder is None:
            raise FileNotFoundError(
                f"{self.address} has no index {name!r}: build it with build_index, or "
                f"`retrodiff database index {self.address} {name}`"
            )
        index, recipe, recall = load_index(folder, self.vectors, self._stored_hash())
        return self.with_index(recipe, index, recall)

    def verify(self) -> list[str]:
        """Reads every byte and says in words what is wrong; empty if nothing is.

        Found are files that are missing or not as they were written (vectors, records, thumbnails,
        deleted rows, saved indexes: by their SHA-256), and files that are as the manifest says and
        still do not fit each other: rows of another hash, norms that are not those of their rows,
        values that are not finite, records of another number of rows, thumbnails that lie outside
        their file. The manifest itself is compared with its own hash whenever it is opened.
        Pictures that the database only names are not looked at.
        """
        from retrodiff.databases.verify import faults

        return faults(self)

    def fetch(self, *kinds: str, progress: bool = True) -> None:
        """Brings every file to this machine; those of a folder are there already."""
        del kinds, progress

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        token: str | None = None,
        message: str = "Share a retrodiff database",
    ) -> str:
        """Uploads the database and its saved indexes to the Hugging Face Hub, with a dataset card.

        One commit, so that readers see all of it or nothing. Folders of this machine are left out
        of the manifest. Deleted rows are hidden from readers, not erased from the files: build the
        database anew before sharing what nobody may have.

        Args:
            repo: ``owner/name``; made where it does not exist.
            private: whether a new repository is hidden from others; a public one that exists is
                refused unless this is False.
            token: None: the one of ``hf auth login``.
            message: of the commit.

        Returns:
            The address of the commit, for `open_database`.
        """
        from retrodiff.databases.push import push

        return push(self, repo, private=private, token=token, message=message)

    def _home(self) -> Path:
        """The folder that indexes are saved in."""
        return self.path

    def _here(self, name: str) -> Path:
        """A file of the database on this machine."""
        return self.path / name

    def _compared(self, name: str) -> Path:
        """The same, once it was compared with its hash."""
        path = self._here(name)
        check_file(path, self.manifest.files[name], AGAIN)
        return path

    def _mapped(self) -> Vectors:
        shards = [self._map_shard(number) for number in range(len(self.manifest.shards))]
        if not shards:
            return Vectors([torch.empty(0, self.manifest.fingerprint.dim)], [torch.empty(0)])
        embeddings, norms = zip(*shards, strict=True)
        return Vectors(embeddings, norms)

    def _map_shard(self, number: int) -> tuple[Tensor, Tensor]:
        """Embeddings (n, d) and norms (n,) of a shard."""
        shard = self.manifest.shards[number]
        file = self._here(str(shard.file("vectors")))
        return map_shard(file, shard.rows, self.manifest.fingerprint.dim)

    def _stored_hash(self) -> str:
        """Hash of the stored rows, deleted ones among them: what an index is built from."""
        return rows_hash(shard.digest for shard in self.manifest.shards)

    def _places(self, indices: Any) -> list[tuple[int, int]]:
        """Row numbers (n,) -> shard, and row in it."""
        rows = self.stored(self._checked(indices))
        shards = torch.searchsorted(self._starts, rows, right=True) - 1
        return list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))

    @property
    def _schema(self) -> Any:
        return self._records.schema


def unfinished(folder: Path) -> bool:
    """Whether a folder holds a build that was killed and can be resumed."""
    if (folder / REPLACED).is_file():
        return False  # an old database that a new one has replaced
    return (folder / BUILD).is_file() or (folder / MANIFEST).is_file()


def _opened_again(
    kind: type[EmbeddingDatabase], address: str, rows: str, recipe: Recipe, root: Path | None
) -> EmbeddingDatabase:
    """The rows that another process had open; an index that it did not save is built again."""
    database = kind.at(address, root)
    if database.fingerprint.rows != rows:
        raise ValueError(f"{address} has changed since it was opened: open it again")
    if recipe.name == "exact":
        return database.with_index(recipe, recipe.build(database.vectors), None)
    if database.saved_indexes().get(recipe.name, (None,))[0] == recipe:
        return database.open_index(recipe.name)
    return database.build_index(recipe, progress=False, save=False)
