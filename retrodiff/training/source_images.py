"""Pictures of any source as training images, read when a step needs them: a set larger than memory.

Squares can be kept in a file that is mapped: pictures in archives and tables lie one behind the
other and are slow to read out of order.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.build.encoding import Reader, encode_rows, pictures_of
from retrodiff.databases.sources.folders import ImageFolder, Source, state_of
from retrodiff.databases.sources.formats import open_source
from retrodiff.databases.sources.skipped import skipped_message
from retrodiff.disk.files import plain_json
from retrodiff.interfaces import Encoder
from retrodiff.numbers import whole
from retrodiff.pictures.converting import to_bytes
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.progress import progress_bar
from retrodiff.retrieval.table import map_table, tabulated
from retrodiff.text import escaped
from retrodiff.training.folder_images import squared
from retrodiff.training.images import LOOKED_AT
from retrodiff.training.prefetch import read_ahead

CHUNK = 64
"""Pictures that are read at a time when all of them are."""

HASHED = 4096
"""Squares that are hashed together."""

FILES = 64
"""Most archives whose size and time are looked at before each picture."""


class SourceImages:
    """Central squares of all readable pictures of a source, read on demand or from a mapped file.

    All pictures are read once when this is made, so that the unreadable ones are left out, named in
    one warning. Afterwards a step reads what it needs, in the workers of
    `TrainingSet.batches(workers=...)`. As in `FolderImages` the network is trained on squares,
    and the encoder sees whole pictures.

    Args:
        source: a source of pictures, or what `open_source` takes: a folder, tars, zips, parquet
            files, a saved dataset.
        size: side of the images.
        workers: processes that read ahead when all pictures are read.
        cache: folder that keeps the squares in one file of 3 * size² bytes each, which is mapped:
            pictures are then decoded once, not in every epoch. What was begun is continued.
        progress: show a bar.

    Raises:
        ValueError: no picture can be read, one gives several rows, or the folder keeps squares of
            other pictures.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Images
        >>> from retrodiff.training import SourceImages
        >>> pictures = Images(torch.zeros(3, 3, 32, 48), records=[{"caption": "black"}] * 3)
        >>> images = SourceImages(pictures, size=16, progress=False)
        >>> len(images), images.column("caption")
        (3, ['black', 'black', 'black'])
    """

    def __init__(
        self,
        source: Source | str | Path,
        size: int,
        *,
        workers: int = 0,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.source: Source = open_source(source) if isinstance(source, (str, Path)) else source
        self.size, self.workers = whole("size", size), whole("workers", workers, 0)
        self._about = _about(self.source, self.size)
        self._states = _states(self.source)
        self._ahead: tuple[int, Iterator[Any]] | None = None
        self._file = None if cache is None else Path(cache).expanduser() / "images.safetensors"
        self._squares: Tensor | None = None
        kind = self.source.describe().get("kind")
        if cache is None and kind in ("tars", "zips", "parquet"):
            warnings.warn(
                f"pictures in {kind} are slow to read out of order, as a training does: give "
                f"cache=FOLDER, which keeps the squares ({_size(len(self.source), self.size)})",
                stacklevel=2,
            )
        self._digest: str | None = None
        if self._file is None:
            good = torch.cat([torch.empty(0), *self._all(progress)])
        else:
            good, self._digest = self._kept(self._file, progress)
        self.numbers: np.ndarray = good.nonzero().flatten().numpy()
        """Of the pictures in the source that could be read."""
        skipped = [
            (escaped(self.source.name(i)), self._reason(i))
            for i in (good == 0).nonzero().flatten().tolist()
        ]
        if not len(self.numbers):
            raise ValueError(f"the source holds no readable image: {skipped_message(skipped)}")
        if skipped:
            warnings.warn(skipped_message(skipped), stacklevel=2)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> images (b, 3, size, size), bytes.

        Raises:
            UnreadableImage: a picture is gone, or has changed since this was made.
        """
        if self._file is not None:
            if self._squares is None:
                self._squares = map_table(self._file)[0]
            kept = self._squares[torch.from_numpy(self.numbers[rows.numpy()])]
            return kept[:, :-1].reshape(-1, 3, self.size, self.size)
        return torch.stack([self._square(int(self.numbers[row])) for row in rows.tolist()])

    def __getstate__(self) -> dict[str, Any]:
        # What is being read stays in its process, and a mapped file is mapped again in the other.
        return {**self.__dict__, "_ahead": None, "_squares": None}

    def name(self, row: int) -> str:
        """What a picture is called."""
        return escaped(self.source.name(int(self.numbers[row])))

    def embed(self, encoder: Encoder, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> embeddings (b, d) of the whole pictures, as a database has them.

        Consecutive calls for consecutive rows go on with what the workers have read ahead.
        """
        first, reader = int(rows[0]), Reader(self.source, encoder)
        if self._ahead is None or self._ahead[0] != first or not _follow(rows):
            numbers = self.numbers[rows.numpy()] if not _follow(rows) else self.numbers[first:]
            self._ahead = first, pictures_of(reader, numbers.tolist(), self.workers)
        done: list[Tensor] = []
        waiting: list[Any] = []
        for _ in range(len(rows)):
            i, read = next(self._ahead[1])
            if isinstance(read, str):
                raise UnreadableImage(f"{reader.name(i)}: {read}")
            waiting += read
            if len(waiting) == CHUNK or reader.full(waiting):
                done.append(encode_rows(encoder, waiting)[0].float())
                waiting = []
        if waiting:
            done.append(encode_rows(encoder, waiting)[0].float())
        self._ahead = first + len(rows), self._ahead[1]
        if self._ahead[0] == len(self) or not _follow(rows):
            self._ahead = None
        return torch.cat(done)

    def column(self, name: str) -> list[Any]:
        """What the source says of each picture under a name, such as ``caption``; None: nothing.

        Every picture is read once more.
        """
        found: list[Any] = []
        for i in self.numbers.tolist():
            (item,) = self.source.read(i)
            found.append(item.record.get(name))
        if all(value is None for value in found):
            known = ", ".join(self.source.read(int(self.numbers[0]))[0].record)
            raise ValueError(f"no picture has a {name!r}; what is known of the first: {known}")
        return found

    def digest(self) -> str:
        """Hash of the squares where they are kept; else of names and sizes, and of some squares."""
        if self._digest is None:
            found = hashlib.sha256(json.dumps(plain_json(self._about)).encode())
            found.update(self.numbers.tobytes())
            looked_at = torch.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).long()
            found.update(self[looked_at].numpy().tobytes())
            self._digest = found.hexdigest()[:32]
        return self._digest

    def _square(self, i: int) -> Tensor:
        """The square of a picture that could be read."""
        self._check_unchanged(i)
        try:
            return _square(self.source, i, self.size)
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(
                f"{escaped(self.source.name(i))} could be read when the training images were "
                f"opened, and now cannot ({error}): put it back and continue"
            ) from None

    def _check_unchanged(self, i: int) -> None:
        if self._states is None:
            return
        if isinstance(self.source, ImageFolder):
            paths, states = [_path(self.source, i)], self._states[i : i + 1]
        else:
            paths, states = list(self.source.paths()), self._states
        for path, state in zip(paths, states, strict=True):
            if _state(path)[0] >= 0 and _state(path) != tuple(state.tolist()):
                raise UnreadableImage(
                    f"{escaped(str(path))} has changed since the training images were opened: put "
                    "the earlier file back and continue, or start anew"
                )

    def _reason(self, i: int) -> str:
        try:
            _square(self.source, i, self.size)
        except Exception as error:
            return str(error)
        return "it could not be read a moment ago"

    def _all(self, progress: bool) -> Iterator[Tensor]:
        """(b,) whether pictures can be read, chunk by chunk."""
        read = _Chunks(self.source, self.size, keep=False)
        with progress_bar(len(self.source), "reading", progress) as bar:
            for found in read_ahead(read, range(-(-len(self.source) // CHUNK)), self.workers):
                yield found[:, -1]
                bar.update(len(found))

    def _kept(self, path: Path, progress: bool) -> tuple[Tensor, str]:
        """Whether pictures can be read (n,), and the hash of the file of squares."""
        about = {"source": json.dumps(plain_json(self._about))}
        read = _Chunks(self.source, self.size, keep=True)
        chunks = range(-(-len(self.source) // CHUNK))
        ahead: list[Iterator[Tensor]] = []

        def compute(start: int, stop: int) -> Tensor:
            if not ahead:
                ahead.append(read_ahead(read, chunks[start // CHUNK :], self.workers))
            found = next(ahead[0])
            assert len(found) == stop - start
            return found

        try:
            self._squares = tabulated(
                compute,
                (len(self.source), 3 * self.size**2 + 1),
                torch.uint8,
                batch_size=CHUNK,
                what="reading",
                progress=progress,
                path=path,
                about={**about, "state": state_of(self.source)},
                resume=True,
            )
        finally:
            for one in ahead:
                with closing(one):  # type: ignore[type-var]
                    pass
        squares = self._squares

        def known(name: str, compute: Callable[[int, int], Tensor], rows: int, width: int, b: int):
            """A small table about the large one."""
            return tabulated(
                compute,
                (rows, width),
                torch.uint8,
                batch_size=b,
                what="reading",
                progress=False,
                path=path.with_name(name),
                about=about,
                resume=True,
            )

        def hashed(start: int, stop: int) -> Tensor:
            parts = [
                squares[i * HASHED : (i + 1) * HASHED].numpy().data for i in range(start, stop)
            ]
            return torch.tensor([list(hashlib.sha256(part).digest()) for part in parts]).byte()

        n = len(squares)
        good = known("readable.safetensors", lambda i, j: squares[i:j, -1:], n, 1, 2**16)
        hashes = known("hashes.safetensors", hashed, -(-n // HASHED), 32, 1)
        return good[:, 0].clone(), hashlib.sha256(hashes.numpy().data).hexdigest()[:32]


class _Chunks:
    """Reads consecutive pictures: squares as rows (b, 3 * size² + 1).

    The last byte is 1 where a picture could be read; without ``keep`` it is all there is.
    """

    def __init__(self, source: Source, size: int, *, keep: bool) -> None:
        self.source, self.size, self.keep = source, size, keep

    def __call__(self, step: int, begun: Callable[[int], None]) -> Tensor:
        chunk = range(step * CHUNK, min((step + 1) * CHUNK, len(self.source)))
        found = torch.zeros(len(chunk), 3 * self.size**2 + 1 if self.keep else 1, dtype=torch.uint8)
        for row, i in zip(found, chunk, strict=True):
            begun(i)
            try:
                square = _square(self.source, i, self.size)
            except SeveralRows:
                raise
            except Exception:  # whatever reads a picture: one that is broken costs itself only
                continue
            row[-1] = 1
            if self.keep:
                row[:-1] = square.reshape(-1)
        return found

    def name(self, number: int) -> str:
        return escaped(self.source.name(number))


class SeveralRows(ValueError):
    """A picture of the source gives several rows."""


def _square(source: Source, i: int, size: int) -> Tensor:
    """The square (3, size, size) of a picture, bytes."""
    items = source.read(i)
    if len(items) != 1:
        raise SeveralRows(
            f"{escaped(source.name(i))} gives {len(items)} images, but a training image is one "
            "picture: give a source without patches"
        )
    return to_bytes(squared(items[0].image, size)).expand(3, -1, -1)


def _follow(rows: Tensor) -> bool:
    return bool((rows.diff() == 1).all())


def _about(source: Source, size: int) -> dict[str, Any]:
    """What a source says of itself, wherever it lies."""
    about = {name: value for name, value in source.describe().items() if name != "root"}
    return {**about, "size": size}


def _states(source: Source) -> np.ndarray | None:
    """Size and time (n, 2) of the files of a folder, or of a few archives; None: of too many."""
    if isinstance(source, ImageFolder):
        return np.array([_state(_path(source, i)) for i in range(len(source))], np.int64)
    get = getattr(source, "paths", None)
    paths = [] if get is None else list(get())
    return np.array([_state(path) for path in paths], np.int64) if 0 < len(paths) <= FILES else None


def _path(source: ImageFolder, i: int) -> Path:
    return source.path / source.files[i]


def _state(path: Path) -> tuple[int, int]:
    try:
        about = os.stat(path)
    except OSError:
        return -1, -1
    return about.st_size, about.st_mtime_ns


def _size(count: int, side: int) -> str:
    """What squares take, in words."""
    size = float(3 * side**2 * count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
