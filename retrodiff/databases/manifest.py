"""The table of contents of a database folder: what is in it, who made it, hashes to prove it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, cast

from retrodiff.disk.files import plain_json
from retrodiff.disk.hashed import read_hashed, write_hashed
from retrodiff.disk.seal import is_sealed, seal
from retrodiff.interfaces import Fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
BUILD = "build.json"
LOG = "shards.jsonl"

AGAIN = "restore it, or build again"
"""What to do about a damaged database, the end of its errors."""

MOST_ROWS = 2**40


@dataclass(frozen=True)
class Shard:
    """Consecutive rows in files of their own.

    Args:
        rows: how many.
        digest: SHA-256 of the stored vectors' bytes.
        files: file name -> {"bytes", "sha256"}.
        next: where the source goes on after this shard: picture, and row of that picture.
        source: which of the manifest's sources the rows come from.
    """

    rows: int
    digest: str
    files: dict[str, dict[str, Any]]
    next: tuple[int, int]
    source: int

    @classmethod
    def of(cls, value: dict[str, Any]) -> Shard:
        """A shard as JSON holds it.

        Raises:
            ValueError: an entry is of another kind than a shard's; a missing one is a KeyError.
        """
        rows, digest, source = value["rows"], value["digest"], value["source"]
        picture, row = value["next"]
        if not _counts(rows, 1) or not all(_counts(n) for n in (picture, row, source)):
            raise ValueError(f"a shard of {rows!r} rows, next={value['next']!r}, source={source!r}")
        if not _is_digest(digest):
            raise ValueError(f"digest={digest!r} is no SHA-256")
        shard = cls(rows, digest, _files(value["files"]), (picture, row), source)
        kinds = [name.partition("-")[0] for name in shard.files]
        if len(set(kinds)) < len(kinds) or not {"vectors", "records"} <= set(kinds):
            raise ValueError(f"a shard of the files {', '.join(shard.files)}")
        return shard

    def file(self, kind: str) -> str | None:
        """The file of a kind (``vectors``, ``records``, ``thumbnails``), None if there is none."""
        return next((name for name in self.files if name.startswith(kind)), None)


@dataclass(frozen=True)
class Manifest:
    """Everything about a database except its rows.

    Args:
        fingerprint: the encoder's; the hash of the rows is computed from the shards.
        shards: in the order of their rows.
        settings: how it was built: batch size, rows per shard, thumbnails.
        sources: what it was built from, and then what was appended.
        skipped: pictures that could not be read: [name, reason].
        deleted: {"file", "rows", "bytes", "sha256"} of the deleted row numbers, or None.
        shared: what only a shared copy needs, {"columns": names, "indexes": {index: {file:
            {"bytes", "sha256"}}}}; None in a folder of one's own.
        trusted: folders of the sources that this user has named himself; None: all of them. In the
            file they bear this user's seal (`retrodiff.disk.seal`), so that nobody else's manifest
            makes anyone read a folder of the machine.
    """

    fingerprint: Fingerprint
    shards: tuple[Shard, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    deleted: dict[str, Any] | None = None
    shared: dict[str, Any] | None = None
    trusted: frozenset[str] | None = None

    @property
    def roots(self) -> frozenset[str]:
        """Folders that pictures of the sources are read from again, to be shown."""
        found = {source["root"] for source in self.sources if isinstance(source.get("root"), str)}
        return frozenset(found if self.trusted is None else found & self.trusted)

    @property
    def rows(self) -> int:
        """Stored rows, deleted ones among them."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file of the database but its indexes: name -> {"bytes", "sha256", ...}."""
        found = {name: about for shard in self.shards for name, about in shard.files.items()}
        if self.deleted:
            found[self.deleted["file"]] = self.deleted
        return found

    def check_sizes(self, folder: Path) -> None:
        """A cheap look for files that are missing or cut short; `verify` looks at every byte."""
        for shard in self.shards:
            for name, about in shard.files.items():
                try:
                    size = (folder / name).stat().st_size
                except FileNotFoundError:
                    raise FileNotFoundError(f"{folder / name} is missing: {AGAIN}") from None
                if size != about["bytes"]:
                    raise ValueError(
                        f"{folder / name} has {size} bytes, its manifest says {about['bytes']}: "
                        f"{AGAIN}"
                    )

    def write(self, path: Path) -> None:
        """Writes the manifest, all at once."""
        value = {"format": FORMAT, "rows": self.rows, **asdict(self)}
        del value["trusted"]
        if self.shared is None:
            del value["shared"]
        if seals := {root: seal(_sealed(root)) for root in sorted(self.roots)}:
            value["seals"] = seals
        write_hashed(path, plain_json(value))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a file.

        Raises:
            ValueError: it is damaged, or its format is newer than this version reads.
        """
        value = read_hashed(path, "a database manifest", AGAIN)
        found = value.get("format")
        if not _counts(found):
            raise ValueError(f"{path} is not a database manifest (no format number): {AGAIN}")
        if found > FORMAT:
            raise ValueError(
                f"{path} has format {found}, this version of retrodiff reads up to {FORMAT}: "
                "upgrade retrodiff"
            )
        try:
            return cls._of(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:300]
            raise ValueError(f"{path} is a damaged database manifest ({reason}): {AGAIN}") from None

    @classmethod
    def _of(cls, value: dict[str, Any]) -> Manifest:
        deleted, shared = value["deleted"], value.get("shared")
        manifest = cls(
            fingerprint=Fingerprint.from_json(value["fingerprint"]),
            shards=tuple(Shard.of(shard) for shard in _list(value["shards"])),
            settings=_object(value["settings"]),
            sources=tuple(_object(source) for source in _list(value["sources"])),
            skipped=tuple(_pair(entry) for entry in _list(value["skipped"])),
            deleted=None if deleted is None else _object(deleted),
            shared=None if shared is None else _object(shared),
            trusted=frozenset(
                root
                for root, mark in _object(value.get("seals", {})).items()
                if is_sealed(_sealed(root), mark)
            ),
        )
        manifest._check(value.get("rows"))
        return manifest

    def _check(self, rows: Any) -> None:
        if rows != self.rows or rows > MOST_ROWS:
            raise ValueError(f"rows={rows!r}, but its shards have {self.rows}")
        named = [name for shard in self.shards for name in shard.files]
        if len(set(named)) < len(named):
            raise ValueError("two shards name one file")
        if any(shard.source >= len(self.sources) for shard in self.shards):
            raise ValueError(f"a shard of another than its {len(self.sources)} sources")
        if self.deleted is not None:
            _files({self.deleted["file"]: self.deleted})
            if not _counts(self.deleted["rows"], 1) or self.deleted["rows"] > self.rows:
                raise ValueError(f"{self.deleted['rows']!r} of {self.rows} rows are deleted")
        if self.shared is not None:
            columns = _list(self.shared["columns"])
            if not all(isinstance(name, str) for name in columns):
                raise ValueError("a column without a name")
            for index, files in _object(self.shared["indexes"]).items():
                if not _plain(index):
                    raise ValueError(f"an index {index!r} that does not lie beside the rows")
                _files(files)


def _sealed(root: str) -> dict[str, str]:
    """What a seal says of a folder."""
    return {"pictures": root}


def _files(value: Any) -> dict[str, dict[str, Any]]:
    """Names of files in the folder itself, with their sizes and hashes; refused if they are not."""
    for name, about in _object(value).items():
        if not _plain(name) or not _counts(about["bytes"]) or not _is_digest(about["sha256"]):
            raise ValueError(f"no file of a database: {name!r}")
    return value


def _counts(value: Any, least: int = 0) -> TypeGuard[int]:
    return type(value) is int and value >= least


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _plain(name: Any) -> bool:
    """Whether a name is that of a file in the folder itself."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\:\0")
        and name.isprintable()
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.50} is no list")
    return cast("list[Any]", value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.50} is no JSON object")
    return cast("dict[str, Any]", value)


def _pair(value: Any) -> tuple[str, str]:
    name, reason = value
    if not isinstance(name, str) or not isinstance(reason, str):
        raise ValueError(f"{value!r:.50} is no skipped picture")
    return name, reason
