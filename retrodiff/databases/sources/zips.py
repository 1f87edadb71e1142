"""Pictures inside zip archives."""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from retrodiff.databases.sources.archives import Archives
from retrodiff.databases.sources.folders import Item
from retrodiff.databases.sources.limits import LARGE, RATIO, one_line
from retrodiff.databases.sources.members import LARGEST, NO_PICTURES
from retrodiff.databases.sources.skipped import Skipped
from retrodiff.databases.sources.walk import is_archive, is_picture, natural
from retrodiff.pictures.decoding import UnreadableImage, looks_like_picture, read_image
from retrodiff.text import escaped

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compressions that are read; of others Python unfolds a piece whole, however large it becomes."""

NAME = 1024
"""Letters of the longest name of a picture."""

_DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, KeyError, IndexError, OverflowError, RuntimeError, MemoryError),
)


class Zips(Archives):
    """Pictures in zip archives; the first folder inside is the label, names sort as people count.

    Nothing is unpacked. Hidden members and ``__MACOSX`` are passed over, and so is what is no
    picture by its ending or its first bytes. A picture that is encrypted, a link, damaged, or would
    unfold to far more than it takes is skipped by its name; archives within the archive are named
    in one warning. Each row has the columns ``key`` (archive and member) and ``label``.

    Args:
        files: the archives, in the order they shall have.
        columns: the same for every row.

    Raises:
        ValueError: a file is no whole zip archive, a member has an absolute path or ``..`` in it,
            a picture is there twice, or there is none in any.

    Examples:
        >>> import io, zipfile
        >>> from PIL import Image
        >>> from retrodiff.databases import Zips
        >>> picture = io.BytesIO()
        >>> Image.new("RGB", (8, 8)).save(picture, "PNG")
        >>> with zipfile.ZipFile("doors.zip", "w") as archive:
        ...     archive.writestr("red/1.png", picture.getvalue())
        >>> Zips("doors.zip").read(0)[0].record
        {'key': 'doors.zip:red/1.png', 'label': 'red'}
    """

    noun = "zips"

    def _listed(self, file: Path, mark: int) -> tuple[Iterator[str], Sequence[Skipped]]:
        opened = _kept(file, mark, os.getpid())
        return (member.name for member in opened.members), opened.unused

    def _key(self, file: Path, mark: int, i: int) -> str:
        return _kept(file, mark, os.getpid()).members[i].name

    def read(self, i: int) -> list[Item]:
        """The picture of member ``i``."""
        file, mark, number = self._place(i)
        try:
            opened = _kept(file, mark, os.getpid())
        except OSError as error:
            raise UnreadableImage(f"{file.name}: {error.strerror or error}") from None
        folder, slash, _ = opened.members[number].name.partition("/")
        record = {"key": self.name(i), "label": folder if slash else None}
        return [Item(read_image(opened.read(number)), record | self.columns)]


class Member(NamedTuple):
    """A picture in a zip archive.

    Args:
        name: with slashes, as text that can be stored.
        place: where the archive lists it.
    """

    name: str
    place: int


class ZipPictures:
    """The pictures of one zip archive, in the order people count.

    Args:
        file: the archive; stays open.
    """

    def __init__(self, file: Path):
        self.file, self._lock = file, Lock()
        try:
            self._zip = zipfile.ZipFile(file)
            self._infos = self._zip.infolist()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except _DAMAGED as error:
            raise ValueError(f"{file} is not a whole zip archive: {one_line(error)}") from None
        self.members: list[Member] = []
        self.unused: list[Skipped] = []
        for place, info in enumerate(self._infos):
            self._take(place, info)
        self.members.sort(key=lambda member: natural(member.name))
        names = [member.name for member in self.members]
        if twice := next((one for one, other in pairwise(names) if one == other), None):
            raise ValueError(f"{file}: member {twice!r} is there twice")

    def read(self, i: int) -> bytes:
        """The bytes of picture ``i``.

        Raises:
            UnreadableImage: they cannot be had, and why.
        """
        info = self._infos[self.members[i].place]
        if (problem := _problem(info)) is not None:
            raise UnreadableImage(problem)
        return self._start(info, info.file_size)

    def _take(self, place: int, info: zipfile.ZipInfo) -> None:
        path = info.filename.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or re.match("[A-Za-z]:/", path):
            name = escaped(info.filename)
            raise ValueError(f"{self.file}: member {name!r} points outside the archive")
        if path.endswith("/") or any(p.startswith(".") or p == "__MACOSX" for p in parts):
            return
        name = escaped("/".join(parts))
        if is_archive(name):
            self.unused.append((name, "an archive within the archive: unpack it"))
        elif len(name) > NAME:
            self.unused.append((f"{name[:60]}...", f"a name of more than {NAME} letters"))
        elif is_picture(name) or self._begins_as_picture(name, info):
            self.members.append(Member(name, place))

    def _begins_as_picture(self, name: str, info: zipfile.ZipInfo) -> bool:
        ending = name.rpartition(".")[2].lower() if "." in name else ""
        if ending in NO_PICTURES or not info.file_size or _problem(info) is not None:
            return False
        try:
            return looks_like_picture(self._start(info, min(info.file_size, 16)))
        except UnreadableImage:
            return False

    def _start(self, info: zipfile.ZipInfo, count: int) -> bytes:
        """The first bytes of a member; reaching its end compares the checksum."""
        try:
            with self._lock, self._zip.open(info) as opened:
                data = opened.read(count)
        except _DAMAGED as error:
            raise UnreadableImage(f"damaged in the archive: {one_line(error)}") from None
        if len(data) < count:
            raise UnreadableImage("the archive ends within it")
        return data


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why a member is not read, as the archive's table of contents says; None: it is."""
    size, small = info.file_size, info.compress_size
    if info.flag_bits & 1:
        return "encrypted: unpack the archive with its password"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link, which is not followed in an archive"
    if info.compress_type not in METHODS:
        return f"compressed by method {info.compress_type}: write the archive again with deflate"
    if size > LARGEST:
        return f"{size} bytes, more than {LARGEST}"
    if size > max(LARGE, RATIO * small):
        return f"would unfold from {small} bytes to {size}"
    return None


@lru_cache(2)
def _kept(file: Path, mark: int, process: int) -> ZipPictures:
    """A zip that is being read; its table of contents is parsed once."""
    del mark, process  # a process that was forked must not share a file's position
    return ZipPictures(file)
