"""Pictures inside tars, as WebDataset and img2dataset write them."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from retrodiff.databases.images import UnreadableImage, read_image
from retrodiff.databases.sources import Item, Source

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")

Members = dict[str, tuple[int, int]]
"""File ending -> where the bytes begin, and how many there are."""


class Tars(Source):
    """Samples of WebDataset / img2dataset tars: a picture, with ``txt``, ``cls`` and ``json``.

    Nothing is unpacked: members are read at their offset. ``txt`` becomes the column ``caption``,
    ``cls`` the column ``label``, the scalars of ``json`` columns of their own names.

    Args:
        files: the tars, uncompressed, in the order they shall have.
        columns: the same for every row.
    """

    def __init__(self, files: Sequence[str | Path], columns: Mapping[str, Any] | None = None):
        self.files = [Path(file) for file in files]
        self.columns = dict(columns or {})
        self.names = _names(self.files)
        digest, counts, some = hashlib.sha256(), [0], False
        for number, file in enumerate(self.files):
            samples = _scan(file)
            counts.append(len(samples))
            for key, _ in samples:  # the same as the hash of all names joined by zeros
                digest.update(b"\0" * some)
                digest.update(f"{self.names[number]}:{key}".encode())
                some = True
        self._starts = np.cumsum(counts)
        self._digest = digest.hexdigest()[:32]
        self._marks = [file.stat().st_mtime_ns for file in self.files]
        if not len(self):
            raise ValueError(f"no pictures in {', '.join(map(str, files)) or 'no tars'}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _sample(self, i: int) -> tuple[int, str, Members]:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        samples = _scanned(self.files[number], self._marks[number])
        return number, *samples[i - int(self._starts[number])]

    def name(self, i: int) -> str:
        """Tar and key."""
        number, key, _ = self._sample(i)
        return f"{self.names[number]}:{key}"

    def read(self, i: int) -> list[Item]:
        """The picture of sample ``i``."""
        number, key, members = self._sample(i)
        record: dict[str, Any] = {"key": f"{self.names[number]}:{key}"}
        with self.files[number].open("rb") as file:

            def member(ending: str) -> bytes:
                file.seek(members[ending][0])
                return file.read(members[ending][1])

            picture = member(next(e for e in PICTURES if e in members))
            if "json" in members:
                try:
                    known = json.loads(member("json"))
                except ValueError as error:
                    raise UnreadableImage(f"broken json: {error}") from None
                if isinstance(known, dict):
                    record |= {k: v for k, v in known.items() if not isinstance(v, dict | list)}
            if "txt" in members:
                record["caption"] = member("txt").decode("utf-8", "replace").strip()
            if "cls" in members:
                record["label"] = member("cls").decode("utf-8", "replace").strip()
        return [Item(read_image(picture), record | self.columns)]

    def describe(self) -> dict[str, Any]:
        """The tars' names, and hash of the keys."""
        return {
            "kind": "tars",
            "files": self.names,
            "count": len(self),
            "names": self._digest,
            "columns": self.columns,
        }


def _scan(file: Path) -> list[tuple[str, Members]]:
    """Keys and members of the samples of a tar that hold a picture, in its order."""
    groups: dict[str, Members] = {}
    end = 0
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512 * member.isreg()
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{file}: member {member.name!r} points outside the archive")
                if not member.isfile():
                    continue
                stem, _, ending = path.name.partition(".")
                group = groups.setdefault(str(path.with_name(stem)), {})
                if ending.lower() in group:
                    raise ValueError(f"{file}: member {member.name!r} is there twice")
                group[ending.lower()] = (member.offset_data, member.size)
        with file.open("rb") as opened:
            opened.seek(end)
            if opened.read(512) != bytes(512):  # Python reads on to the end and says nothing
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not a whole, uncompressed tar: {error}") from None
    return [(k, members) for k, members in groups.items() if any(e in PICTURES for e in members)]


@lru_cache(2)
def _scanned(file: Path, mark: int) -> list[tuple[str, Members]]:
    """The samples of a tar that is being read; those of all tars would not fit into memory."""
    del mark  # tells apart what had one name at different times
    return _scan(file)


def _names(files: Sequence[Path]) -> list[str]:
    """What each tar is called in keys: its file name, or its path where two have the same one."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        paths = [file.resolve() for file in files]
        if len(set(paths)) < len(paths):
            twice = next(file for file in paths if paths.count(file) > 1)
            raise ValueError(f"{twice} is given twice: its keys would not be of one picture each")
        above = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(above).as_posix() for path in paths]
    return names
