"""Sources of pictures for a database: folders of files, and pictures in memory.

Opening by number, not streaming, is what lets a build continue where it was killed and lets worker
processes decode ahead.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from retrodiff.databases.sources.walk import files_below, holds_database, is_archive, is_tar
from retrodiff.pictures.converting import to_image, to_images
from retrodiff.pictures.decoding import UnreadableImage, read_image
from retrodiff.text import escaped


class Item(NamedTuple):
    """A row to be encoded: an image (c, h, w), uint8 or float in [-1, 1], and its record.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Item
        >>> item = Item(torch.zeros(3, 8, 8, dtype=torch.uint8), {"file": "black.png"})
        >>> item.image.shape, item.record["file"]
        (torch.Size([3, 8, 8]), 'black.png')
    """

    image: Tensor
    record: dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Pictures by number; one picture may give several rows.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Item, Source
        >>> class Grays(Source):
        ...     # Pictures of one gray each.
        ...     def __len__(self):
        ...         return 3
        ...
        ...     def name(self, i):
        ...         return f"gray {i}"
        ...
        ...     def read(self, i):
        ...         return [
        ...             Item(
        ...                 torch.full((3, 8, 8), 100 * i, dtype=torch.uint8),
        ...                 {"key": self.name(i)},
        ...             )
        ...         ]
        ...
        ...     def describe(self):
        ...         return {"kind": "grays", "count": len(self)}
        >>> Grays().read(2)[0].record
        {'key': 'gray 2'}
    """

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

    def paths(self) -> Iterable[Path]:
        """The files that pictures are read from; a build that goes on finds them unchanged."""
        return ()

    def ids(self) -> Iterable[Any] | None:
        """The ``id`` of every picture, None where it has none; None: the pictures have no ids."""
        return None


class ImageFolder(Source):
    r"""Every file below a folder; the first sub-folder is the label, names sort as people count.

    Links to folders are followed, each folder once. Hidden files and folders are left out, and so
    are databases and unfinished ones. What is no picture, no file, or cannot be opened is skipped
    by its name. Bytes of names that are no UTF-8 stand in records as ``\xe9``.

    Args:
        path: the folder.
        columns: the same for every row, such as ``{"license": "CC0", "credit": "NASA"}``.

    Raises:
        FileNotFoundError: there is no folder at the path.
        ValueError: the folder is a database, or holds no files.

    Examples:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from retrodiff.databases import ImageFolder
        >>> Path("photos/doors").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save("photos/doors/red.png")
        >>> source = ImageFolder("photos", columns={"license": "CC0"})
        >>> source.read(0)[0].record
        {'file': 'doors/red.png', 'label': 'doors', 'license': 'CC0'}
    """

    def __init__(self, path: str | Path, columns: Mapping[str, Any] | None = None):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: give a folder of images")
        if holds_database(self.path):
            raise ValueError(f"{path} is a database, not pictures: give a folder of images")
        self.columns = dict(columns or {})
        found = files_below(self.path)
        self.files = [one.name for one in found]
        self.problems = {one.name: one.problem for one in found if one.problem is not None}
        if not self.files:
            raise ValueError(f"{path} holds no files: give a folder of images")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """The file, relative to the folder."""
        return escaped(self.files[i])

    def read(self, i: int) -> list[Item]:
        """The picture of file ``i``.

        Raises:
            UnreadableImage: the file is no picture, or cannot be opened.
        """
        file = self.files[i]
        if (problem := self.problems.get(file)) is not None:
            raise UnreadableImage(problem)
        try:
            image = read_image(self.path / file)
        except UnreadableImage:
            if is_tar(file):
                raise UnreadableImage("a tar: open it by its own path") from None
            if is_archive(file):
                reason = "an archive: unpack it, or open it by its own path"
                raise UnreadableImage(reason) from None
            raise
        label = escaped(file.split("/", 1)[0]) if "/" in file else None
        return [Item(image, {"file": escaped(file), "label": label, **self.columns})]

    def paths(self) -> Iterable[Path]:
        """The files."""
        return (self.path / file for file in self.files)

    def describe(self) -> dict[str, Any]:
        """Folder, hash of the names in it, and the size of all files together."""
        return {
            "kind": "folder",
            "root": escaped(str(self.path.resolve())),
            "count": len(self),
            "names": _hash_of(self.files),
            "bytes": sum(_size(self.path / file) for file in self.files),
            "columns": self.columns,
        }


class Images(Source):
    """Pictures that are in memory already, or a list of files.

    Args:
        images: whatever `retrodiff.pictures.to_images` takes: (n, c, h, w), or a list of (c, h, w),
            PIL images, arrays or paths. Paths are read when their turn comes.
        records: one per image; by default its number.
        columns: the same for every row.

    Raises:
        ValueError: pixels of a type or range whose meaning is open.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Images
        >>> source = Images(torch.zeros(2, 3, 8, 8), records=[{"name": "a"}, {"name": "b"}])
        >>> source.read(1)[0].record
        {'name': 'b'}
    """

    def __init__(
        self,
        images: Any,
        records: Sequence[Mapping[str, Any]] | None = None,
        columns: Mapping[str, Any] | None = None,
    ):
        self.images: Any = images
        if isinstance(images, list | tuple) and any(isinstance(i, str | Path) for i in images):
            self.images = [_checked(image, i) for i, image in enumerate(images)]
        elif not isinstance(images, Tensor) or not _as_stored(images):
            self.images = to_images(images)
        if records is not None and len(records) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images, but {len(records)} records: give one for each"
            )
        if not len(self.images):
            raise ValueError("no images: give at least one")
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
        return [Item(self._image(i), record | self.columns)]

    def _image(self, i: int) -> Tensor:
        image = self.images[i]
        return read_image(image) if isinstance(image, str | Path) else image

    def ids(self) -> Iterable[Any] | None:
        """The records' ``id``."""
        has = self.records and any("id" in record for record in self.records)
        return [record.get("id") for record in self.records] if self.records and has else None

    def describe(self) -> dict[str, Any]:
        """Hash of all pixels; of files their names and sizes."""
        digest = hashlib.sha256()
        for image in self.images:
            if isinstance(image, Tensor):
                digest.update(f"{image.dtype}{tuple(image.shape)}".encode())
                digest.update(image.detach().contiguous().cpu().numpy().tobytes())
            else:
                digest.update(f"{escaped(str(image))} {_size(image)}".encode())
        return {"kind": "images", "count": len(self), "pixels": digest.hexdigest()[:32]}


def state_of(source: Source) -> str | None:
    """Hash of the sizes and times of the files that a source reads; None where it reads none."""
    paths = getattr(source, "paths", None)  # a foreign source need not know of it
    return None if paths is None else state_of_files(paths())


def state_of_files(files: Iterable[Path]) -> str | None:
    """Hash of the sizes and times of files, in their order; None: there are none."""
    digest, found = hashlib.sha256(), list(files)
    for file in found:
        try:
            about = os.stat(file)
            digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b"missing\n")
    return digest.hexdigest() if found else None


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


def _checked(image: Any, i: int) -> Tensor | str | Path:
    return image if isinstance(image, str | Path) else to_image(image, name=f"images[{i}]")


def _as_stored(images: Tensor) -> bool:
    """Whether a tensor is what `Images` holds already; refused where its meaning is open."""
    kept = to_images(images)
    return not kept or (kept[0].dtype == images.dtype and kept[0].shape == images.shape[1:])


def _size(file: str | Path) -> int:
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return 0


def _hash_of(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:32]
