"""Lists what lies below a folder, in the order in which people count."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from retrodiff.databases.manifest import BUILD, MANIFEST

ENDINGS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "avifs", "jfif", "jpe"),
    *("jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "heic", "heif", "jxl", "ppm", "pgm", "pbm", "pnm"),
    *("pfm", "apng", "ico", "icns", "cur", "dib", "tga", "dds", "psd", "pcx", "qoi", "sgi", "mpo"),
    *("bw", "ras", "xbm", "xpm", "im"),
)
"""Endings of picture files, the most usual first."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Endings of tars, compressed or not."""

OTHER_ARCHIVES = (".zip", ".rar", ".7z")
"""Endings of other files that may hold pictures and are none."""


class Found(NamedTuple):
    """A file below a folder, or a folder there that was not entered.

    Args:
        name: relative to the folder, with slashes.
        problem: why it cannot be used; None: it is to be tried.
    """

    name: str
    problem: str | None = None


def files_below(folder: Path) -> list[Found]:
    """Every file below a folder; a folder that links lead to several times is entered once.

    Hidden files and folders, finished databases and unfinished ones are left out.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    return sorted(_walk(folder), key=lambda found: natural(found.name))


def has_pictures(folder: Path) -> bool:
    """Whether a folder, or one below it, holds a file that is named as a picture."""
    return any(is_picture(found.name) for found in _walk(folder))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as those of pictures do."""
    return name.rpartition(".")[2].lower() in ENDINGS and "." in name


def is_tar(name: str) -> bool:
    """Whether a file's name ends as those of tars do, compressed or not."""
    return name.lower().endswith(ARCHIVES)


def is_archive(name: str) -> bool:
    """Whether a file's name ends as those of archives do, tars included."""
    return is_tar(name) or name.lower().endswith(OTHER_ARCHIVES)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``img2`` before ``img10``."""
    parts = re.split(r"(\d+)", name)
    key = [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]
    return [*key, (-1, 0, name)]


def _walk(folder: Path) -> Iterator[Found]:
    real, linked, seen = deque([""]), deque[str](), set[tuple[int, int]]()
    while real or linked:  # what lies there is named as it lies there, links come last
        here = real.popleft() if real else linked.popleft()
        try:
            about = os.stat(folder / here)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder / here) as opened:
                entries = sorted(opened, key=lambda entry: natural(entry.name))
        except OSError as error:
            if not here:
                raise
            yield Found(f"{here}/", f"the folder cannot be opened: {error.strerror}")
            continue
        names = {entry.name for entry in entries}
        if here and (MANIFEST in names or BUILD in names) and holds_database(folder / here):
            continue
        if here.endswith(".partial"):
            if any(map(is_picture, names)):
                yield Found(f"{here}/", "unfinished work of a killed run, not entered")
            continue
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                (linked if entry.is_symlink() else real).append(name)
            else:
                yield Found(name)


def holds_database(folder: Path) -> bool:
    """Whether a folder is a database, finished or being built, whatever state it is in."""
    for name in (MANIFEST, BUILD):
        try:
            with open(folder / name, "rb") as file:
                head = file.read(4096)
        except OSError:
            continue
        if b'"format"' in head and b'"fingerprint"' in head:
            return True
    return False
