"""The table of contents of a database folder: what is in it, who made it, hashes to prove it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retrodiff.files import plain_json, write_json
from retrodiff.interfaces import Fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
BUILD = "build.json"
LOG = "shards.jsonl"


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
        """A shard as JSON holds it."""
        files, following = value["files"], tuple(value["next"])
        return cls(value["rows"], value["digest"], files, following, value["source"])

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
    """

    fingerprint: Fingerprint
    shards: tuple[Shard, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    deleted: dict[str, Any] | None = None
    shared: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        """Stored rows, deleted ones among them."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file of the database but its indexes: name -> {"bytes", "sha256", ...}."""
        found = {name: about for shard in self.shards for name, about in shard.files.items()}
        if self.deleted:
            found[self.deleted["file"]] = self.deleted
        return found

    def write(self, path: Path) -> None:
        """Writes the manifest, all at once."""
        value = {"format": FORMAT, "rows": self.rows, **asdict(self)}
        if self.shared is None:
            del value["shared"]
        write_json(path, plain_json(value))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a file, refused if its format is newer than this library."""
        try:
            value = json.loads(path.read_text("utf-8"))
            found = int(value["format"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is not a database manifest: restore it, or build again"
            ) from None
        if found > FORMAT:
            raise ValueError(
                f"{path} has format {found}, this version of retrodiff reads up to {FORMAT}: "
                "upgrade retrodiff"
            )
        try:
            manifest = cls._of(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is a damaged database manifest ({error!r}): restore it, or build again"
            ) from None
        return manifest

    @classmethod
    def _of(cls, value: dict[str, Any]) -> Manifest:
        manifest = cls(
            fingerprint=Fingerprint(**value["fingerprint"]),
            shards=tuple(Shard.of(shard) for shard in value["shards"]),
            settings=value["settings"],
            sources=tuple(value["sources"]),
            skipped=tuple((name, reason) for name, reason in value["skipped"]),
            deleted=value["deleted"],
            shared=value.get("shared"),
        )
        indexes = (manifest.shared or {}).get("indexes", {})
        for files in (manifest.files, *indexes.values()):
            for name, about in files.items():
                if not _plain(name) or not _measured(about["bytes"], about["sha256"]):
                    raise ValueError(f"no file of a database: {name!r}")
        if not all(map(_plain, indexes)):
            raise ValueError("an index that does not lie beside the rows")
        return manifest


def _measured(size: Any, digest: Any) -> bool:
    """Whether these are a file's size and its SHA-256, which becomes a path."""
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return whole and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None


def _plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")
