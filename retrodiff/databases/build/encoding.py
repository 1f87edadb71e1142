"""Reads pictures and encodes them; other processes decode ahead of the encoder.

A picture is brought to the size that the encoder takes where it is read, so that of large pictures
only those being decoded are in memory. Batches depend on the pictures and their order only, and end
where shards end, so that a build that was interrupted gives the same bytes as one that was not.
Other processes hand over chunks of pictures, each as one piece of shared memory, and have about two
batches ready while the encoder works.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrodiff.databases.sources.folders import Item, Source
from retrodiff.databases.sources.limits import one_line
from retrodiff.interfaces import Encoder, member
from retrodiff.numbers import whole
from retrodiff.pictures.converting import to_float, to_images
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.pictures.thumbnails import thumbnail
from retrodiff.text import escaped

NARROWEST = 100
"""How many times longer than the other one side of a picture may be."""

SMALL_PIXELS = 2**18
"""Pixels up to which a picture waits for the encoder as it is: it is smaller than as floats."""

CHUNK = 16
"""Pictures that another process hands over at a time, at most."""

AHEAD = 2**28
"""Bytes of prepared pictures that other processes may have ready."""

SHARED = "/dev/shm"
"""Where shared memory lies on Linux; inside a container there may be little."""

HELD_PIXELS = 2**24
"""Pixels at which a batch ends for an encoder that takes pictures as they are."""


class Batch(NamedTuple):
    """Consecutive rows of a source, encoded, and where the source goes on behind them.

    Args:
        embeddings: (n, d).
        records: one per row.
        thumbnails: one per row, or none at all.
        next: picture, and row of that picture.
        skipped: name and reason of every picture before ``next`` that could not be read.
    """

    embeddings: Tensor
    records: list[dict[str, Any]]
    thumbnails: list[bytes]
    next: tuple[int, int]
    skipped: list[tuple[str, str]]


class Row(NamedTuple):
    """A row to be encoded: the prepared picture, and its record.

    Args:
        pixels: (1, ...) as ``encoder.encode_prepared`` takes it, or an image (c, h, w).
        prepared: which of the two.
        record: where it comes from.
        thumbnail: a small copy of the image, if there is to be one.
    """

    pixels: Tensor
    prepared: bool
    record: dict[str, Any]
    thumbnail: bytes | None


class Reader:
    """Reads the pictures of a source by number, ready for an encoder; can be sent to a process.

    Args:
        source: the pictures.
        encoder: what will take them. For one with ``preprocessing`` (or ``prepare``) and
            ``encode_prepared`` large pictures are brought to its size at once.
        side: longest side of the thumbnails; None: there are none.
        quality: of the thumbnails; see `build_database`.
        small: pixels up to which a picture is left to be prepared with its batch.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        side: int | None = None,
        quality: int | None = None,
        *,
        small: int = SMALL_PIXELS,
    ):
        self.source, self.side, self.quality, self.small = source, side, quality, small
        self.prepare = preparation(encoder)

    def __call__(self, i: int) -> list[Row] | str:
        """The rows of picture ``i``; the reason, where it cannot be read."""
        try:
            items = self.source.read(i)
        except UnreadableImage as error:
            return escaped(str(error))
        except Exception as error:  # one broken picture never ends a build, whatever reads it
            return escaped(f"{type(error).__name__}: {one_line(error)}")
        if (reason := next(filter(None, map(_too_narrow, items)), None)) is not None:
            return reason
        # Many patches of one picture take less memory as they are.
        small = self.small if len(items) <= CHUNK else max(self.small, SMALL_PIXELS)
        return [self._row(item, small) for item in items]

    def name(self, i: int) -> str:
        """What picture ``i`` is called."""
        return escaped(self.source.name(i))

    def full(self, rows: Sequence[Row]) -> bool:
        """Whether rows hold so many pixels that no more shall be waiting for the encoder."""
        sizes = (row.pixels.shape[-2:].numel() for row in rows)
        return self.prepare is None and sum(sizes) > HELD_PIXELS

    def _row(self, item: Item, small: int) -> Row:
        image = item.image
        copy = thumbnail(image, self.side, self.quality) if self.side else None
        if self.prepare is None or image.shape[-2:].numel() <= small:
            return Row(image, False, item.record, copy)
        return Row(self.prepare(image[None]), True, item.record, copy)


def _too_narrow(item: Item) -> str | None:
    h, w = item.image.shape[-2:]
    if max(h, w) <= NARROWEST * min(h, w):
        return None
    return f"{w} x {h} pixels: one side is more than {NARROWEST} times the other"


def preparation(encoder: Encoder) -> Callable[[Tensor], Tensor] | None:
    """The encoder's function from images (b, c, h, w) to what `encode_prepared` takes, or None.

    It takes uint8 in [0, 255] and floats in [-1, 1].
    """
    return member(encoder, Encoder, "preparation")


def encode_here(
    source: Source,
    encoder: Encoder,
    settings: Mapping[str, Any],
    start: tuple[int, int],
    workers: int,
) -> Iterator[Batch]:
    """All rows of a source from ``start`` on, encoded in this process.

    Args:
        source: the pictures.
        encoder: what places them.
        settings: ``batch_size``, ``shard_rows`` and ``thumbnails``, as the manifest keeps them.
        start: picture, and row of that picture.
        workers: processes that decode ahead.
    """
    most = whole("batch_size", settings["batch_size"])
    side, quality = settings["thumbnails"], settings.get("thumbnail_quality")
    reader = Reader(source, encoder, side, quality, small=0 if workers else SMALL_PIXELS)
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    done, memory = 0, Memory()

    def batch(at: tuple[int, int]) -> Batch:
        return Batch(*encode_rows(encoder, rows, memory), at, skipped)

    for i, read in pictures_of(reader, range(start[0], len(source)), workers, most):
        if isinstance(read, str):
            skipped.append((reader.name(i), read))
            continue
        before = start[1] if i == start[0] else 0
        for j, row in enumerate(read[before:], before + 1):
            rows.append(row)
            room = settings["shard_rows"] - done % settings["shard_rows"]
            if len(rows) == min(most, room) or reader.full(rows):
                yield batch((i, j) if j < len(read) else (i + 1, 0))
                done += len(rows)
                rows, skipped = [], []
    yield batch((len(source), 0))


def encode_pictures(
    source: Source,
    encoder: Encoder,
    numbers: Iterable[int] | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> Tensor:
    """Pictures of a source -> embeddings (n, d), the same ones that a build of it gives.

    Args:
        source: the pictures.
        encoder: what places them.
        numbers: of the pictures, in any order; None: all. A picture of several rows gives several.
        batch_size: rows per call of the encoder.
        workers: processes that decode ahead.

    Raises:
        UnreadableImage: one of them cannot be read; the message names it.
    """
    batch_size = whole("batch_size", batch_size)
    reader = Reader(source, encoder, small=0 if workers else SMALL_PIXELS)
    chosen = range(len(source)) if numbers is None else [int(i) for i in numbers]
    done, rows = [torch.empty(0, encoder.dim)], []
    for i, read in pictures_of(reader, chosen, workers, batch_size):
        if isinstance(read, str):
            raise UnreadableImage(f"{reader.name(i)}: {read}")
        for row in read:
            rows.append(row)
            if len(rows) == batch_size or reader.full(rows):
                done.append(encode_rows(encoder, rows)[0].float())
                rows = []
    return torch.cat([*done, encode_rows(encoder, rows)[0].float()])


class Memory:
    """The memory of a batch, taken again by the next one: fresh pages cost more than a copy."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors (n, ...) of one shape behind each other, until the next call."""
        first, rows = parts[0], sum(map(len, parts))
        if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
            return torch.cat(list(parts))
        kept = self._kept
        if kept.dtype != first.dtype or kept.shape[1:] != first.shape[1:] or len(kept) < rows:
            self._kept = kept = first.new_empty(rows, *first.shape[1:])
        return torch.cat(list(parts), out=kept[:rows])


def encode_rows(
    encoder: Encoder, rows: Sequence[Row], memory: Memory | None = None
) -> tuple[Tensor, list[dict[str, Any]], list[bytes]]:
    """Rows that a `Reader` gave -> embeddings (n, d), records, and thumbnails if they have some.

    Args:
        encoder: what places them.
        rows: of a batch.
        memory: for the batch; what the encoder gives may lie in it until the next call.
    """
    embeddings = torch.empty(0, encoder.dim)
    if any(row.prepared for row in rows):
        prepare, encode = _two_steps(encoder)
        parts = [row.pixels if row.prepared else prepare(row.pixels[None]) for row in rows]
        embeddings = encode((memory or Memory()).joined(parts)).cpu()
    elif rows:
        embeddings = _encode(encoder, [row.pixels for row in rows]).cpu()
    if embeddings.shape != (len(rows), encoder.dim):
        raise ValueError(
            f"the encoder gave embeddings of shape {tuple(embeddings.shape)} for "
            f"{len(rows)} images, its dim={encoder.dim}"
        )
    small = [row.thumbnail for row in rows if row.thumbnail is not None]
    return embeddings, [row.record for row in rows], small


def encode_images(encoder: Encoder, images: Any) -> Tensor:
    """Pictures of any sizes -> embeddings (b, d), each size in one call if need be.

    Args:
        encoder: what places them.
        images: whatever `retrodiff.pictures.to_images` takes, such as a list of (c, h, w), of PIL
            images or of paths.
    """
    return _encode(encoder, to_images(images))


def _encode(encoder: Encoder, images: Sequence[Tensor]) -> Tensor:
    """Images (c, h, w) of any sizes, uint8 or floats in [-1, 1] -> embeddings (b, d)."""
    alike = len({(image.shape, image.dtype) for image in images}) == 1
    if preparation(encoder) is not None:
        prepare, encode = _two_steps(encoder)
        if alike:
            # Few pixels at a time: what is computed stays in the processor's cache.
            few = max(1, min(64, SMALL_PIXELS // max(images[0].shape[-2:].numel(), 1)))

            def prepared(some: Sequence[Tensor]) -> Tensor:
                parts = [some[i : i + few] for i in range(0, len(some), few)]
                return torch.cat([prepare(torch.stack(list(part))) for part in parts])

            parts = [images[i : i + 64] for i in range(0, len(images), 64)]
            return torch.cat([encode(prepared(part)) for part in parts])
        return encode(torch.cat([prepare(image[None]) for image in images]))
    if alike:
        return encoder.encode_image(to_float(torch.stack(list(images))))
    out = torch.empty(len(images), encoder.dim)
    for shape in dict.fromkeys(image.shape for image in images):
        same = [i for i, image in enumerate(images) if image.shape == shape]
        batch = torch.stack([to_float(images[i]) for i in same])
        out[same] = encoder.encode_image(batch).float().cpu()
    return out


def _two_steps(encoder: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    prepare = preparation(encoder)
    assert prepare is not None
    return prepare, member(encoder, Encoder, "encode_prepared")


def pictures_of(
    reader: Reader, numbers: Sequence[int], workers: int, batch_size: int = 64
) -> Iterator[tuple[int, list[Row] | str]]:
    """Numbers of pictures, in the order given, each with its rows or why it cannot be read.

    Args:
        reader: of the source.
        numbers: which pictures.
        workers: processes that decode ahead.
        batch_size: rows that are wanted at a time; about twice as many are read ahead.
    """
    if not workers:
        for i in numbers:
            yield i, reader(i)
        return
    from torch.utils.data import DataLoader

    # Pictures that wait as they are may be large: one at a time, and two of each process ahead.
    most = 1 if reader.prepare is None else max(1, min(CHUNK, batch_size // workers))
    each = 2 if most == 1 else max(2, -(-2 * batch_size // (workers * most)))
    chunks = _Chunks(len(numbers), most, _room() // (workers * each))
    loader = DataLoader(
        _Pictures(reader, numbers),
        batch_sampler=chunks,
        num_workers=workers,
        prefetch_factor=each,
        collate_fn=_packed,
    )

    def arriving() -> Iterator[list[Row] | str]:
        for packs, pictures in loader:
            chunks.tell(sum(pack.nbytes for pack in packs) // len(pictures))
            for read in pictures:
                yield read if isinstance(read, str) else _unpacked(read, packs)

    yield from zip(numbers, arriving(), strict=True)


class _Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, reader: Reader, numbers: Sequence[int]):
        self.reader, self.numbers = reader, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> list[Row] | str:
        return self.reader(self.numbers[i])


class _Chunks(torch.utils.data.Sampler[Any]):
    """Places 0 to n - 1 in runs of up to ``most`` pictures that take ``room`` bytes together.

    How large pictures are is known once the first are there; the first run is of one.
    """

    def __init__(self, n: int, most: int, room: int):
        self.n, self.most, self.room = n, most, room
        self._size = 1

    def __iter__(self) -> Iterator[list[int]]:
        at = 0
        while at < self.n:
            end = min(at + self._size, self.n)  # the size may change before the next run
            yield list(range(at, end))
            at = end

    def tell(self, size: int) -> None:
        """Says how many bytes a picture took."""
        fits = self.room // max(size, 1)
        self._size = max(1, min(self.most, fits, 2 * self._size))


def _room() -> int:
    """Bytes that pictures may take on their way from other processes."""
    try:
        return min(AHEAD, shutil.disk_usage(SHARED).free // 4)
    except OSError:
        return AHEAD


Place = tuple[int, int]
"""Number of a pack, and of a tensor in it."""


def _packed(
    pictures: list[list[Row] | str],
) -> tuple[list[Tensor], list[list[tuple[Row, Place]] | str]]:
    """Pictures with the pixels of all rows of one shape in one tensor, which processes share."""
    from torch.utils.data import default_collate

    kinds: dict[Any, list[Tensor]] = {}
    out: list[list[tuple[Row, Place]] | str] = []
    for read in pictures:
        if isinstance(read, str):
            out.append(read)
            continue
        rows: list[tuple[Row, Place]] = []
        for row in read:
            kind = (row.pixels.shape, row.pixels.dtype)
            same = kinds.setdefault(kind, [])
            same.append(row.pixels)
            place = (list(kinds).index(kind), len(same) - 1)
            rows.append((row._replace(pixels=_NO_PIXELS), place))
        out.append(rows)
    return [default_collate(same) for same in kinds.values()], out


def _unpacked(rows: list[tuple[Row, Place]], packs: Sequence[Tensor]) -> list[Row]:
    return [row._replace(pixels=packs[kind][i]) for row, (kind, i) in rows]


_NO_PIXELS: Any = None
"""In place of pixels that are on their way in a pack."""
