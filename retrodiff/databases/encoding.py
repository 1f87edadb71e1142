"""Turns pictures into rows: worker processes decode ahead, the encoder takes batch after batch.

Batches end where shards end and depend on row numbers only, so that a build that was interrupted
gives the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrodiff.databases.images import UnreadableImage, thumbnail, to_float
from retrodiff.databases.sources import Item, Source
from retrodiff.interfaces import Encoder


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
    items: list[Item] = []
    skipped: list[tuple[str, str]] = []
    rows = 0

    def batch(at: tuple[int, int]) -> Batch:
        return Batch(*encode_items(encoder, items, settings["thumbnails"]), at, skipped)

    for i, read in _pictures(source, start[0], workers):
        if isinstance(read, str):
            skipped.append((source.name(i), read))
            continue
        before = start[1] if i == start[0] else 0
        for j, item in enumerate(read[before:], before + 1):
            items.append(item)
            room = settings["shard_rows"] - rows % settings["shard_rows"]
            if len(items) == min(settings["batch_size"], room):
                yield batch((i, j) if j < len(read) else (i + 1, 0))
                rows += len(items)
                items, skipped = [], []
    yield batch((len(source), 0))


def encode_items(
    encoder: Encoder, items: Sequence[Item], side: int | None
) -> tuple[Tensor, list[dict[str, Any]], list[bytes]]:
    """Rows to be -> embeddings (n, d), records, and thumbnails if a ``side`` is given."""
    embeddings = torch.empty(0, encoder.dim)
    if items:
        embeddings = encode_images(encoder, [item.image for item in items]).cpu()
    if embeddings.shape != (len(items), encoder.dim):
        raise ValueError(
            f"the encoder gave embeddings of shape {tuple(embeddings.shape)} for "
            f"{len(items)} images, its dim={encoder.dim}"
        )
    small = [thumbnail(item.image, side) for item in items] if side else []
    return embeddings, [item.record for item in items], small


def encode_images(encoder: Encoder, images: Sequence[Tensor]) -> Tensor:
    """Images (c, h, w) of any sizes -> embeddings (b, d), each size in one call if need be."""
    if len({(image.shape, image.dtype) for image in images}) == 1:
        return encoder.encode_image(to_float(torch.stack(list(images))))
    floats = [to_float(image) for image in images]
    prepare, encode = (getattr(encoder, n, None) for n in ("prepare", "encode_prepared"))
    if prepare is not None and encode is not None:
        return encode(torch.cat([prepare(image[None]) for image in floats]))
    out = torch.empty(len(floats), encoder.dim)
    for shape in dict.fromkeys(image.shape for image in floats):
        same = [i for i, image in enumerate(floats) if image.shape == shape]
        out[same] = encoder.encode_image(torch.stack([floats[i] for i in same])).float().cpu()
    return out


def read_or_reason(source: Source, i: int) -> list[Item] | str:
    """The rows of picture ``i``; the reason, where it cannot be read."""
    try:
        return source.read(i)
    except UnreadableImage as error:
        return str(error)


def _pictures(source: Source, start: int, workers: int) -> Iterator[tuple[int, list[Item] | str]]:
    if not workers:
        for i in range(start, len(source)):
            yield i, read_or_reason(source, i)
        return
    from torch.utils.data import DataLoader

    loader = DataLoader(_Pictures(source, start), batch_size=None, num_workers=workers)
    yield from enumerate(loader, start)


class _Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, i: int) -> list[Item] | str:
        return read_or_reason(self.source, self.start + i)
