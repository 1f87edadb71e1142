"""Base class of archives of pictures: files that are listed once and read by number."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrodiff.databases.sources.folders import Source
from retrodiff.databases.sources.skipped import Skipped, warn_of_unused
from retrodiff.disk.files import listed
from retrodiff.text import escaped


class Archives(Source):
    """Pictures inside files, known by the file's name and a key; subclass it for one format.

    A subclass says what it is called (`noun`), lists a file (`_listed`), and reads a picture that
    it finds by `_place`.

    Args:
        files: one, or several in the order they shall have.
        columns: the same for every row.

    Raises:
        ValueError: a file cannot be listed, or there is no picture in any.
    """

    noun = "archives"

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        columns: Mapping[str, Any] | None = None,
    ):
        self.files = listed(files)
        self.columns = dict(columns or {})
        self.names = _names(self.files)
        self._marks = [file.stat().st_mtime_ns for file in self.files]
        digest, counts, some = hashlib.sha256(), [0], False
        unused: list[Skipped] = []
        for name, file, mark in zip(self.names, self.files, self._marks, strict=True):
            keys, left = self._listed(file, mark)
            counts.append(0)
            unused += [(f"{name}:{member}", why) for member, why in left]
            for key in keys:  # the same as the hash of all names joined by zeros
                digest.update(b"\0" * some)
                digest.update(f"{name}:{key}".encode())
                counts[-1] += 1
                some = True
        self._starts = np.cumsum(counts)
        self._digest = digest.hexdigest()[:32]
        if not len(self):
            named = ", ".join(map(str, self.files))
            raise ValueError(f"no pictures in {named or f'no {self.noun}'}")
        warn_of_unused(self.noun, unused)

    @abstractmethod
    def _listed(self, file: Path, mark: int) -> tuple[Iterator[str], Sequence[Skipped]]:
        """Keys of the pictures in a file, in their order, and what looks like pictures and is none.

        Args:
            file: one of the files.
            mark: its time, which tells apart what had one name at different times.
        """
        ...

    @abstractmethod
    def _key(self, file: Path, mark: int, i: int) -> str:
        """The key of picture ``i`` of a file."""
        ...

    def _place(self, i: int) -> tuple[Path, int, int]:
        """The file of picture ``i``, its time, and the number of the picture there."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.files[number], self._marks[number], i - int(self._starts[number])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """File and key."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return f"{self.names[number]}:{self._key(*self._place(i))}"

    def paths(self) -> Iterable[Path]:
        """The files."""
        return self.files

    def describe(self) -> dict[str, Any]:
        """The files' names and sizes, and hash of the keys."""
        return {
            "kind": self.noun,
            "files": self.names,
            "count": len(self),
            "names": self._digest,
            "bytes": sum(file.stat().st_size for file in self.files),
            "columns": self.columns,
        }


def _names(files: Sequence[Path]) -> list[str]:
    """What each file is called in keys: its file name, or its path where two have the same one."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        paths = [file.resolve() for file in files]
        if len(set(paths)) < len(paths):
            twice = next(file for file in paths if paths.count(file) > 1)
            raise ValueError(f"{twice} is given twice: its keys would not be of one picture each")
        above = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(above).as_posix() for path in paths]
    return [escaped(name) for name in names]
