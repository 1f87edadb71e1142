"""What a database is built from: pictures that can be opened by number.

Opening by number, not streaming, is what lets a build continue where it was killed and lets worker
processes decode ahead.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from retrodiff.databases.images import read_image


class Item(NamedTuple):
    """One row to be: an image (c, h, w), uint8 or float in [-1, 1], and where it comes from."""

    image: Tensor
    record: dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Pictures by number; one picture may give several rows."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """What picture ``i`` is called when it must be skipped."""
        ...

    @abstractmethod
    def read(self, i: int) -> list[Item]:
        """The rows of picture ``i``; raises `UnreadableImage` where it cannot be decoded."""
        ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What must be the same when a build is resumed, as JSON-able values."""
        ...

    def ids(self) -> Iterable[Any] | None:
        """The ``id`` of every picture, None where it has none; None: the pictures have no ids."""
        return None


class ImageFolder(Source):
    """Every file below a folder; the first sub-folder is the label, names sort as people count.

    Args:
        path: the folder. Hidden files and folders are left out.
        columns: the same for every row, such as ``{"licence": "CC0", "credit": "NASA"}``.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, Any] | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: give a folder of images")
        self.columns = dict(columns or {})
        self.files = sorted(_files(self.path), key=natural)
        if not self.files:
            raise ValueError(f"{path} holds no files: give a folder of images")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """The file, relative to the folder."""
        return self.files[i]

    def read(self, i: int) -> list[Item]:
        """The picture of file ``i``."""
        file = self.files[i]
        label = file.split("/", 1)[0] if "/" in file else None
        record = {"file": file, "label": label, **self.columns}
        return [Item(read_image(self.path / file), record)]

    def describe(self) -> dict[str, Any]:
        """Folder, and hash of the names in it."""
        return {
            "kind": "folder",
            "root": str(self.path.resolve()),
            "count": len(self),
            "names": _hash_of(self.files),
            "columns": self.columns,
        }


class Images(Source):
    """Images that are in memory already.

    Args:
        images: (n, c, h, w), or a list of (c, h, w); uint8 in [0, 255] or float in [-1, 1].
        records: one per image; by default its number.
        columns: the same for every row.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        records: Sequence[Mapping[str, Any]] | None = None,
        columns: Mapping[str, Any] | None = None,
    ):
        if records is not None and len(records) != len(images):
            raise ValueError(f"{len(images)} images, but {len(records)} records: give one for each")
        if not len(images):
            raise ValueError("no images: give at least one")
        self.images = images
        self.records = records
        self.columns = dict(columns or {})

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """The record's file, or the number."""
        return str(self.records[i].get("file", f"image {i}")) if self.records else f"image {i}"

    def read(self, i: int) -> list[Item]:
        """Image ``i``."""
        record = dict(self.records[i]) if self.records else {"number": i}
        return [Item(self.images[i], record | self.columns)]

    def ids(self) -> Iterable[Any] | None:
        """The records' ``id``."""
        has = self.records and any("id" in record for record in self.records)
        return [record.get("id") for record in self.records] if self.records and has else None

    def describe(self) -> dict[str, Any]:
        """Hash of all pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.dtype}{tuple(image.shape)}".encode())
            digest.update(image.contiguous().cpu().numpy().tobytes())
        return {"kind": "images", "count": len(self), "pixels": digest.hexdigest()[:32]}


def check_ids(source: Source, before: Iterable[Any] = ()) -> None:
    """Refuses pictures that share an ``id``, or have one that is in the database already.

    Args:
        source: the pictures.
        before: ids of the rows that are there; the rows of one picture follow each other.
    """
    get = getattr(source, "ids", None)  # a foreign source need not know of ids
    if get is None or get() is None:
        return
    known = [one for one, _ in groupby(map(plain_id, before))]

    def ids() -> Iterator[Any]:
        yield from known
        yield from map(plain_id, get() or ())

    if (found := first_duplicate(ids)) is not None:
        value, first, second = found
        n = len(known)
        there = "a row of the database" if first < n else source.name(first - n)
        raise ValueError(
            f"{source.name(second - n)} has id {value!r}, which {there} has too: give every "
            "picture an id of its own, or rename the column"
        )


def plain_id(value: Any) -> Any:
    """An id as a plain hashable value, whether Python, numpy or pyarrow holds it."""
    for unpack in ("as_py", "item"):
        if hasattr(value, unpack):
            value = getattr(value, unpack)()
    return str(value) if isinstance(value, list | dict) else value


def first_duplicate(ids: Callable[[], Iterable[Any]]) -> tuple[Any, int, int] | None:
    """The first id that is there twice, and both its places; None: all differ, Nones aside.

    Takes eight bytes per id: hashes are sorted, and only if two agree the ids are asked for again.
    """
    hashes = np.fromiter((hash(value) for value in ids() if value is not None), np.int64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[Any, int] = {}
    for place, value in enumerate(ids() if twice else ()):
        if value is not None and hash(value) in twice:
            if value in seen:
                return value, seen[value], place
            seen[value] = place
    return None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``img2`` before ``img10``."""
    parts = re.split(r"(\d+)", name)
    key = [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]
    return [*key, (-1, 0, name)]


def _files(folder: Path) -> Iterable[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _hash_of(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:32]
