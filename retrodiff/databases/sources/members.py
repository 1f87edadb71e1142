"""Finds the samples of a tar, as WebDataset and img2dataset write them, without unpacking it.

A member ``KEY.png`` is the picture of the sample ``KEY``, and ``KEY.txt``, ``KEY.cls`` and
``KEY.json`` describe it. A key ends at the first dot of the base name, as WebDataset has it; where
that leaves a picture without a sample of its own (``22.05.png``), it ends at the last dot.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, NamedTuple

from retrodiff.databases.sources.walk import ENDINGS, is_picture, is_tar
from retrodiff.pictures.decoding import looks_like_picture
from retrodiff.text import escaped

SIDES = ("json", "txt", "cls")
"""Endings of what describes a picture."""

NO_PICTURES = (
    *(*SIDES, "npy", "npz", "pt", "pth", "pkl", "pickle", "pyd", "cbor", "msg", "ten", "tar"),
    *("csv", "tsv", "xml", "html", "md", "yaml", "toml", "caption", "text", "url", "id"),
    *("safetensors", "parquet", "mp4", "mp3", "wav", "flac", "zip"),
)
"""Endings of members that are not looked into."""

CHUNK = 2**20
LARGEST = 2**29
"""Bytes of the largest member that is read from a compressed tar."""

Place = tuple[int, int]
"""Where the bytes of a member begin, and how many there are."""


class Sample(NamedTuple):
    """A picture in a tar.

    Args:
        key: its name without the ending.
        picture: its bytes.
        sides: ``json``, ``txt`` and ``cls``, where they are there.
    """

    key: str
    picture: Place
    sides: dict[str, Place]


class Contents(NamedTuple):
    """What a tar holds: its samples in their order, and pictures that belong to none, with why."""

    samples: list[Sample]
    unused: list[tuple[str, str]]


class TarBytes:
    """The bytes of a tar, which may be compressed (gzip, bzip2, xz, zstandard).

    Reading never asks for more than the file can hold. Going back in a compressed one begins anew.

    Args:
        file: the tar; its first bytes tell the compression.
    """

    def __init__(self, file: Path):
        self.file = file
        self.size = file.stat().st_size
        self.last = b""
        self.lock = Lock()
        self._at = 0
        self._opened: Any = None
        with file.open("rb") as opened:
            self.compression = _compression(opened.read(6))
        self._reopen()

    def read(self, count: int = -1) -> bytes:
        """The next bytes, fewer at the end."""
        if not 0 <= count <= (LARGEST if self.compression else self.size):
            if self.compression or count < 0:
                raise tarfile.ReadError(f"a member claims {count} bytes")
            count = self.size
        try:
            self.last = self._opened.read(count)
        except Exception as error:  # each decompressor has errors of its own
            raise tarfile.ReadError(f"damaged: {error}") from None
        self._at += len(self.last)
        return self.last

    def seek(self, place: int) -> int:
        """Goes to a place, or to the end if that comes first."""
        if not self.compression:
            self._at = self._opened.seek(max(place, 0))
            return self._at
        if place < self._at:
            self._reopen()
        while self._at < place and self.read(min(place - self._at, CHUNK)):
            pass
        return self._at

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def close(self) -> None:
        """Closes the file."""
        if self._opened is not None:
            self._opened.close()

    def __del__(self) -> None:
        if hasattr(self, "_opened"):
            self.close()

    def _reopen(self) -> None:
        self.close()
        self._at = 0
        if self.compression == "zstd":
            import pyarrow as pa

            self._opened = pa.input_stream(str(self.file), compression="zstd")
        else:
            openers = {"": open, "gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            self._opened = openers[self.compression](self.file, "rb")


def contents(file: Path) -> Contents:
    """Samples of a tar.

    Raises:
        ValueError: it is no whole tar, names a member twice, or one that lies outside it.
    """
    opened = TarBytes(file)
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            members = list(_members(file, tar, opened))
        if opened.last != bytes(512):  # Python reads on to the end and says nothing
            raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} is not a whole tar: {reason}") from None
    finally:
        opened.close()
    return _grouped(*_linked(file, members))


class _Member(NamedTuple):
    name: str
    place: Place | None
    link: str | None
    picture: bool
    problem: str | None


def _members(file: Path, tar: tarfile.TarFile, opened: TarBytes) -> Iterator[_Member]:
    while (about := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        path = PurePosixPath(about.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file}: member {about.name!r} points outside the archive")
        if about.size < 0:  # Python would read it again and again
            raise tarfile.ReadError("a member of negative size")
        name = escaped(str(path))
        picture = is_picture(name)
        if about.islnk():
            yield _Member(name, None, escaped(str(PurePosixPath(about.linkname))), picture, None)
        elif about.issym():
            to = posixpath.normpath(posixpath.join(str(path.parent), about.linkname))
            yield _Member(name, None, escaped(to), picture, None)
        elif about.isfile() and not about.issparse():
            if is_tar(name):
                yield _Member(name, None, None, True, "a tar within the tar: unpack it")
                continue
            ending = path.name.rpartition(".")[2].lower() if "." in path.name else ""
            if not picture and ending not in NO_PICTURES and about.size:
                opened.seek(about.offset_data)
                picture = looks_like_picture(opened.read(min(about.size, 16)))
            yield _Member(name, (about.offset_data, about.size), None, picture, None)
        elif picture and not about.isdir():
            yield _Member(name, None, None, True, "a sparse file, pipe or device")


def _linked(file: Path, members: list[_Member]) -> tuple[list[_Member], list[tuple[str, str]]]:
    """The members with bytes, links with those that they lead to; and pictures without bytes."""
    known: dict[str, _Member] = {}
    for member in members:
        if known.setdefault(member.name, member) is not member:
            raise ValueError(f"{file}: member {member.name!r} is there twice")
    found, unused = [], []
    for member in members:
        if any(part.startswith(".") for part in member.name.split("/")):
            continue
        end, steps = member, 0
        while end is not None and end.link is not None and steps < 40:
            end, steps = known.get(end.link), steps + 1
        if end is not None and end.place is not None:
            found.append(member._replace(place=end.place, picture=member.picture or end.picture))
        elif member.picture:
            why = member.problem or f"a link to {member.link}, which the tar does not hold"
            unused.append((member.name, why))
    return found, unused


def _grouped(members: list[_Member], unused: list[tuple[str, str]]) -> Contents:
    """Samples in the order of their first members."""
    pictures: dict[str, tuple[int, _Member]] = {}
    sides: dict[str, dict[str, tuple[int, Place]]] = {}
    later: list[tuple[int, _Member]] = []

    def rank(member: _Member) -> int:
        ending = _split(member.name, first=True)[1]
        return ENDINGS.index(ending) if ending in ENDINGS else len(ENDINGS)

    def take(key: str, number: int, member: _Member) -> None:
        if key in pictures:
            unused.append((member.name, f"a second picture of {pictures[key][1].name}"))
        else:
            pictures[key] = number, member

    direct: dict[str, list[tuple[int, _Member]]] = {}
    for number, member in enumerate(members):
        key, ending = _split(member.name, first=True)
        if member.picture and (ending in ENDINGS or not ending):
            direct.setdefault(key, []).append((number, member))
        elif member.picture:
            later.append((number, member))
        else:
            key, ending = _split(member.name, first=False)
            if ending in SIDES and member.place is not None:
                sides.setdefault(key, {}).setdefault(ending, (number, member.place))
    for key, several in direct.items():
        for number, member in sorted(several, key=lambda one: rank(one[1])):
            take(key, number, member)
    for number, member in later:
        first, last = _split(member.name, first=True)[0], _split(member.name, first=False)[0]
        own = last if is_picture(member.name) else member.name
        take(first if first in direct else own, number, member)
    samples = []
    for key, (number, member) in pictures.items():
        about = sides.get(key, {})
        assert member.place is not None
        sample = Sample(key, member.place, {end: place for end, (_, place) in about.items()})
        samples.append((min(number, *(n for n, _ in about.values()), number), sample))
    return Contents([sample for _, sample in sorted(samples, key=lambda one: one[0])], unused)


def _split(name: str, *, first: bool) -> tuple[str, str]:
    """Key and lower-case ending of a member, cut at the first or at the last dot of its name."""
    above, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".") if first else base.rpartition(".")
    return (above + slash + stem, ending.lower()) if dot else (name, "")


def _compression(head: bytes) -> str:
    for name, magic in {
        "gzip": b"\x1f\x8b",
        "bz2": b"BZh",
        "xz": b"\xfd7zXZ\0",
        "zstd": b"\x28\xb5\x2f\xfd",
    }.items():
        if head.startswith(magic):
            return name
    return ""
