"""Pictures inside tars, as WebDataset and img2dataset write them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from retrodiff.databases.sources.archives import Archives
from retrodiff.databases.sources.folders import Item
from retrodiff.databases.sources.members import Contents, Place, Sample, TarBytes, contents
from retrodiff.databases.sources.skipped import Skipped
from retrodiff.pictures.decoding import UnreadableImage, read_image
from retrodiff.text import escaped

ABOUT_BYTES = 2**24
"""Bytes of the largest ``json``, ``txt`` or ``cls`` that is read."""


class Tars(Archives):
    """Samples of WebDataset / img2dataset tars: a picture, with ``txt``, ``cls`` and ``json``.

    Nothing is unpacked: members are read at their offset. ``txt`` becomes the column ``caption``,
    ``cls`` the column ``label``, the scalars of ``json`` columns of their own names; where one of
    them cannot be read, the column ``json_error`` (``txt_error``, ``cls_error``) says why.

    Links within a tar are followed, hidden members passed over. Members that look like pictures
    and belong to no sample are counted and named in one warning. A compressed tar (gzip, bzip2,
    xz, zstandard) is decompressed once to be listed, and once in every process that reads it.

    Args:
        files: the tars, in the order they shall have.
        columns: the same for every row.

    Raises:
        ValueError: a file is no whole tar, or there is no picture in any.

    Examples:
        >>> import io, tarfile
        >>> from PIL import Image
        >>> from retrodiff.databases import Tars
        >>> picture = io.BytesIO()
        >>> Image.new("RGB", (8, 8)).save(picture, "PNG")
        >>> with tarfile.open("shard.tar", "w") as tar:
        ...     for name, data in (("0.png", picture.getvalue()), ("0.txt", b"a black square")):
        ...         info = tarfile.TarInfo(name)
        ...         info.size = len(data)
        ...         tar.addfile(info, io.BytesIO(data))
        >>> Tars("shard.tar").read(0)[0].record
        {'key': 'shard.tar:0', 'caption': 'a black square'}
    """

    noun = "tars"

    def _listed(self, file: Path, mark: int) -> tuple[Iterator[str], Sequence[Skipped]]:
        del mark
        samples, unused = contents(file)
        return (sample.key for sample in samples), unused

    def _key(self, file: Path, mark: int, i: int) -> str:
        return _contents(file, mark).samples[i].key

    def read(self, i: int) -> list[Item]:
        """The picture of sample ``i``."""
        file, mark, number = self._place(i)
        sample = _contents(file, mark).samples[number]
        record: dict[str, Any] = {"key": self.name(i)}
        with _opened(file, mark) as tar:
            places = sorted([sample.picture, *sample.sides.values()])  # forward, if it can be
            found = {place: _bytes(tar, place, sample) for place in places}
        about = {ending: found[place] for ending, place in sample.sides.items()}
        if "json" in about:
            record |= _described(about["json"])
        for ending, column in (("txt", "caption"), ("cls", "label")):
            text = about.get(ending)
            if isinstance(text, bytes):
                record[column] = text.decode("utf-8", "replace").strip()
            elif text is not None:
                record[f"{ending}_error"] = text
        picture = found[sample.picture]
        if isinstance(picture, str):
            raise UnreadableImage(picture)
        return [Item(read_image(picture), record | self.columns)]


def _bytes(tar: TarBytes, place: Place, sample: Sample) -> bytes | str:
    """The bytes of a member, or why they cannot be had."""
    start, size = place
    if place != sample.picture and size > ABOUT_BYTES:
        return f"{size} bytes, more than {ABOUT_BYTES}"
    try:
        tar.seek(start)
        data = tar.read(size)
    except (tarfile.TarError, OSError) as error:
        return f"cannot be read: {error}"
    return data if len(data) == size else "the tar ends within it"


def _described(text: bytes | str) -> dict[str, Any]:
    """The scalars of a JSON object, by name; or what is wrong with it."""
    if isinstance(text, str):
        return {"json_error": text}
    try:
        known = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {"json_error": escaped(f"broken json: {error}")}
    if not isinstance(known, dict):
        return {}
    return {
        escaped(name): escaped(value) if isinstance(value, str) else value
        for name, value in known.items()
        if not isinstance(value, dict | list)
    }


@lru_cache(2)
def _contents(file: Path, mark: int) -> Contents:
    """The samples of a tar that is being read; those of all tars would not fit into memory."""
    del mark  # tells apart what had one name at different times
    return contents(file)


@contextmanager
def _opened(file: Path, mark: int) -> Iterator[TarBytes]:
    """A tar to read from; it stays open, since the bytes of compressed ones come in order only."""
    try:
        tar = _kept(file, mark, os.getpid())
    except OSError as error:
        raise UnreadableImage(f"{file.name}: {error.strerror or error}") from None
    with tar.lock:
        yield tar


@lru_cache(2)
def _kept(file: Path, mark: int, process: int) -> TarBytes:
    del mark, process  # a process that was forked must not share a file's position
    return TarBytes(file)
