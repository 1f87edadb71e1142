"""Reads pictures and encodes them; other processes decode ahead of the encoder.

A picture is brought to the size that the encoder takes where it is read, so that of large pictures
only those being decoded are in memory. Batches depend on the pictures and their order only, and end
where shards end, so that a build that was interrupted gives the same bytes as one that was not.
"""

from __future__ import annotations

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
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        side: int | None = None,
        quality: int | None = None,
    ):
        self.source, self.side, self.quality = source, side, quality
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
        return [self._row(item) for item in items]

    def name(self, i: int) -> str:
        """What picture ``i`` is called."""
        return escaped(self.source.name(i))

    def full(self, rows: Sequence[Row]) -> bool:
        """Whether rows hold so many pixels that no more shall be waiting for the encoder."""
        sizes = (row.pixels.shape[-2:].numel() for row in rows)
        return self.prepare is None and sum(sizes) > HELD_PIXELS

    def _row(self, item: Item) -> Row:
        image = item.image
        h, w = image.shape[-2:]
        small = thumbnail(image, self.side, self.quality) if self.side else None
        if self.prepare is None or h * w <= SMALL_PIXELS:
            return Row(image, False, item.record, small)
        return Row(self.prepare(image[None]), True, item.record, small)


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
    reader = Reader(source, encoder, settings["thumbnails"], settings.get("thumbnail_quality"))
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    done = 0

    def batch(at: tuple[int, int]) -> Batch:
        return Batch(*encode_rows(encoder, rows), at, skipped)

    for i, read in pictures_of(reader, range(start[0], len(source)), workers):
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
    reader = Reader(source, encoder)
    chosen = range(len(source)) if numbers is None else [int(i) for i in numbers]
    done, rows = [torch.empty(0, encoder.dim)], []
    for i, read in pictures_of(reader, chosen, workers):
        if isinstance(read, str):
            raise UnreadableImage(f"{reader.name(i)}: {read}")
        for row in read:
            rows.append(row)
            if len(rows) == batch_size or reader.full(rows):
                done.append(encode_rows(encoder, rows)[0].float())
                rows = []
    return torch.cat([*done, encode_rows(encoder, rows)[0].float()])


def encode_rows(
    encoder: Encoder, rows: Sequence[Row]
) -> tuple[Tensor, list[dict[str, Any]], list[bytes]]:
    """Rows that a `Reader` gave -> embeddings (n, d), records, and thumbnails if they have some."""
    embeddings = torch.empty(0, encoder.dim)
    if any(row.prepared for row in rows):
        prepare, encode = _two_steps(encoder)
        parts = [row.pixels if row.prepared else prepare(row.pixels[None]) for row in rows]
        embeddings = encode(torch.cat(parts)).cpu()
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
            parts = [torch.stack(list(images[i : i + 64])) for i in range(0, len(images), 64)]
            return torch.cat([encode(prepare(part)) for part in parts])
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
    reader: Reader, numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, list[Row] | str]]:
    """Numbers of pictures, in the order given, each with its rows or why it cannot be read.

    Args:
        reader: of the source.
        numbers: which pictures.
        workers: processes that decode ahead.
    """
    if not workers:
        for i in numbers:
            yield i, reader(i)
        return
    from torch.utils.data import DataLoader

    loader = DataLoader(_Pictures(reader, numbers), batch_size=None, num_workers=workers)
    yield from zip(numbers, loader, strict=True)


class _Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, reader: Reader, numbers: Sequence[int]):
        self.reader, self.numbers = reader, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> list[Row] | str:
        return self.reader(self.numbers[i])
