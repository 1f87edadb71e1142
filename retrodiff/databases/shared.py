"""A database on the Hugging Face Hub: opened at once, fetched as it is read, every byte checked.

Opening fetches the manifest (and the list of deleted rows, where there is one). Vectors, records
and thumbnails come shard by shard when they are first needed, into the Hub client's own cache, and
are compared with the manifest's SHA-256 before anything reads them. The commit is pinned at the
start, so a database never changes under its reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.databases.hub_errors import hub_errors
from retrodiff.databases.manifest import MANIFEST, Manifest
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.disk.hashed import file_digest
from retrodiff.indexes import Vectors, saved_index
from retrodiff.progress import progress_bar

_ADDRESS = re.compile(r"hf:/{1,2}datasets/([^/@\s]+/[^/@\s]+)(?:@([^@\s]+))?")
_AT_ONCE = 8  # files fetched at a time
_KINDS = ("vectors", "records", "thumbnails", "indexes")


class SharedDatabase(EmbeddingDatabase):
    """Rows of a database that was shared by `push_to_hub`; use `open_database` to get one.

    Args:
        repository: the dataset, at one commit.
        path: the folder of that commit in the cache.
        manifest: its table of contents.
        root: folder that the records' files are relative to.

    Examples:
        >>> from retrodiff import open_database
        >>> from retrodiff.databases import EmbeddingDatabase, SharedDatabase
        >>> database = open_database("hf://datasets/me/library@v1")  # doctest: +SKIP
        >>> issubclass(SharedDatabase, EmbeddingDatabase)
        True
    """

    def __init__(
        self, repository: Repository, path: Path, manifest: Manifest, root: str | Path | None
    ):
        self.repository = repository
        shared = manifest.shared or {}
        self._columns: list[str] | None = shared.get("columns")
        self._indexes: list[str] = list(shared.get("indexes", {}))
        self._about = dict(manifest.files)
        for name, files in shared.get("indexes", {}).items():
            self._about |= {f"indexes/{name}/{file}": about for file, about in files.items()}
        self._fetched: dict[str, Path] = {}
        super().__init__(path, manifest, root)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.address})"

    @classmethod
    def at(cls, address: str | Path, root: str | Path | None = None) -> SharedDatabase:
        """The database at an address such as ``hf://datasets/OWNER/NAME@REVISION``."""
        return open_shared(str(address), root=root, token=None)

    @property
    def address(self) -> str:
        """Where it is, with the commit: `open_database` opens these very rows with it."""
        return str(self.repository)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return super().columns if self._columns is None else tuple(self._columns)

    def fetch(self, *kinds: str, progress: bool = True) -> None:
        """Fetches what is not here yet, so that no network is needed afterwards.

        Args:
            kinds: of ``vectors``, ``records``, ``thumbnails``, ``indexes``; none given: all.
            progress: show a bar.

        Raises:
            ValueError: there is no kind of file of that name.
        """
        if unknown := [kind for kind in kinds if kind not in _KINDS]:
            raise ValueError(f"fetch({unknown[0]!r}): give some of {', '.join(_KINDS)}, or none")
        self._fetch([name for name in self._about if name.startswith(kinds or "")], progress)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The records of all rows as pyarrow tables, shard by shard."""
        self.fetch("records")
        return super().tables(columns)

    def index_folders(self) -> dict[str, Path]:
        """Where the saved indexes lie: those that were shared, and those built here since."""
        shared = {name: self._here(f"indexes/{name}/index.json").parent for name in self._indexes}
        return {**shared, **self._built_here()}

    def open_index(self, name: str) -> EmbeddingDatabase:
        """The same database, searched by a saved index; a shared one is fetched first."""
        if name in self._indexes and name not in self._built_here():
            self._fetch([file for file in self._about if file.startswith(f"indexes/{name}/")])
        return super().open_index(name)

    def verify(self) -> list[str]:
        """What is wrong with the files, in words; fetches those that are not here yet."""
        wrong = []
        for name in self._about:
            try:
                self._here(name)
            except ValueError as error:
                wrong.append(str(error))
        return wrong or super().verify()

    def _built_here(self) -> dict[str, Path]:
        """Indexes that were built here, of these very rows: all commits have one home."""
        found: dict[str, Path] = {}
        with suppress(OSError):  # a home that cannot be written holds no index either
            for name, folder in super().index_folders().items():
                with suppress(ValueError):
                    if saved_index(folder)[2] == self._stored_hash():
                        found[name] = folder
        return found

    def _home(self) -> Path:
        from huggingface_hub import cached_assets_path

        return Path(cached_assets_path("retrodiff", self.repository.name, "database"))

    def _here(self, name: str) -> Path:
        if name not in self._fetched:
            path = self.repository.file(name)
            self._check(name, path)
            self._fetched[name] = path
        return self._fetched[name]

    def _check(self, name: str, path: Path) -> None:
        """Refuses a file that is not the manifest's; the same file is read for that only once."""
        about, stat = self._about[name], path.stat()
        mark = f"{stat.st_size} {stat.st_mtime_ns}"
        with suppress(OSError):
            if (self._home() / "checked" / about["sha256"]).read_text() == mark:
                return
        if stat.st_size != about["bytes"] or file_digest(path) != about["sha256"]:
            path.resolve().unlink(missing_ok=True)  # in the cache, a name links to the bytes
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{name} of {self.address} is not the file its manifest names (SHA-256 differs), "
                "and is not used: try again, or tell whoever shared it"
            )
        with suppress(OSError):
            receipt = self._home() / "checked" / about["sha256"]
            receipt.parent.mkdir(exist_ok=True)
            receipt.write_text(mark)

    def _fetch(self, names: Sequence[str], progress: bool = True) -> None:
        missing = [name for name in names if name not in self._fetched]
        if not missing:
            return
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            with progress_bar(len(missing), f"fetching {self.repository.name}", progress) as bar:
                for _ in pool.map(self._here, missing):
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)

    def _mapped(self) -> Vectors:
        return _SharedVectors(self) if self.manifest.shards else super()._mapped()


class _SharedVectors(Vectors):
    """Rows of shards that are fetched and mapped when they are first read."""

    def __init__(self, database: SharedDatabase):
        shards = database.manifest.shards
        self.dim = database.manifest.fingerprint.dim
        self._names = [str(shard.file("vectors")) for shard in shards]
        self._fetch, self._map = database._fetch, database._map_shard
        self._shards: dict[int, tuple[Tensor, Tensor]] = {}
        self.parts = cast("list[Tensor]", _Lazy(len(shards), lambda i: self._shard(i)[0]))
        self.norms = cast("list[Tensor]", _Lazy(len(shards), lambda i: self._shard(i)[1]))
        self._starts = torch.tensor([0, *(shard.rows for shard in shards)]).cumsum(0)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, stored values (n, d) and norms (n,), at most ``size`` rows at a time."""
        self._fetch(self._names)
        return super().blocks(size)

    def ready(self, parts: Sequence[int]) -> None:
        """Fetches the shards that are about to be read."""
        self._fetch([self._names[i] for i in parts])

    def rows(self, indices: Tensor) -> Tensor:
        """Row numbers (n,) -> stored values (n, d) in float32."""
        shards = torch.searchsorted(self._starts, indices.unique(), right=True).unique() - 1
        self._fetch([self._names[i] for i in shards.tolist()])
        return super().rows(indices)

    def _shard(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._shards:
            self._shards[number] = self._map(number)
        return self._shards[number]


class _Lazy(Sequence[Tensor]):
    def __init__(self, count: int, get: Callable[[int], Tensor]):
        self.size, self.get = count, get

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.get(i)


class Repository:
    """A dataset on the Hub at one commit.

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit; None: the main branch.
        token: None: the one of ``hf auth login``.
    """

    def __init__(self, name: str, revision: str | None, token: str | None):
        self.name, self.revision, self.token = name, revision, token

    def __str__(self) -> str:
        return f"hf://datasets/{self.name}" + (f"@{self.revision}" if self.revision else "")

    def file(self, name: str) -> Path:
        """A file on this machine: fetched if it is not in the cache."""
        from huggingface_hub import hf_hub_download

        with hub_errors(f"{name} of {self}"):
            return Path(
                hf_hub_download(
                    self.name,
                    name,
                    revision=self.revision,
                    repo_type="dataset",
                    token=self.token,
                    library_name="retrodiff",
                )
            )


def open_shared(address: str, *, root: str | Path | None, token: str | None) -> SharedDatabase:
    """The database at an address such as ``hf://datasets/OWNER/NAME@REVISION``."""
    found = _ADDRESS.fullmatch(address.rstrip("/"))
    if found is None:
        raise ValueError(
            f"{address} is no address of a shared database: write hf://datasets/OWNER/NAME or "
            "hf://datasets/OWNER/NAME@REVISION"
        )
    manifest = Repository(found[1], found[2], token).file(MANIFEST)
    # The cache keeps a folder for every commit; from here on, that commit is asked for.
    pinned = Repository(found[1], manifest.parent.name, token)
    return SharedDatabase(pinned, manifest.parent, Manifest.read(manifest), root)
