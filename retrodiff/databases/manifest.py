"""The table of contents of a database folder: what is in it, who made it, hashes to prove it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retrodiff.files import write_json
from retrodiff.interfaces import Fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
BUILD = "build.json"


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
    """

    fingerprint: Fingerprint
    shards: tuple[Shard, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    deleted: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        """Stored rows, deleted ones among them."""
        return sum(shard.rows for shard in self.shards)

    def write(self, path: Path) -> None:
        """Writes the manifest, all at once."""
        value = {"format": FORMAT, "rows": self.rows, **asdict(self)}
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a file, refused if its format is newer than this library."""
        try:
            value = json.loads(path.read_text("utf-8"))
            found = value.pop("format")
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise ValueError(
                f"{path} is not a database manifest: restore it, or build again"
            ) from None
        if found > FORMAT:
            raise ValueError(
                f"{path} has format {found}, this version of retrodiff reads up to {FORMAT}: "
                "upgrade retrodiff"
            )
        return cls(
            fingerprint=Fingerprint(**value["fingerprint"]),
            shards=tuple(
                Shard(s["rows"], s["digest"], s["files"], tuple(s["next"]), s["source"])
                for s in value["shards"]
            ),
            settings=value["settings"],
            sources=tuple(value["sources"]),
            skipped=tuple((name, reason) for name, reason in value["skipped"]),
            deleted=value["deleted"],
        )
