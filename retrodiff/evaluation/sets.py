"""Reads a set of images for evaluation: features, names, labels, licenses, small copies to show."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases import Images, Item, Searchable, Source, open_database, open_source
from retrodiff.databases.build.encoding import Reader, Row, encode_images, encode_rows
from retrodiff.databases.sources.skipped import SkippedPictures, skipped_message
from retrodiff.evaluation.planted import KINDS, plant
from retrodiff.evaluation.views import Views
from retrodiff.interfaces import Database, Record
from retrodiff.pictures.converting import to_float
from retrodiff.pictures.thumbnails import to_bytes
from retrodiff.progress import progress_bar

SIDE = 96
BATCH = 64

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class ImageSet:
    """Images as a metric sees them.

    Args:
        name: where they come from.
        features: (n, d).
        files: n names.
        small: n small copies as JPEG or PNG bytes.
        detail: (n, e) features for the copying report; None: the same as ``features``.
        mirrored: (n, e) the same of the mirror images; None: not made.
        logits: (n, classes) where the network is a classifier.
        records: n records of where they come from; empty: none are kept.
        sizes: sizes that occur, as they were before any resizing.
        image: number -> image (c, h, w) in [-1, 1], to look again; None: they are not at hand.
    """

    name: str
    features: Tensor
    files: tuple[str, ...]
    small: tuple[bytes, ...]
    detail: Tensor | None = None
    mirrored: Tensor | None = None
    logits: Tensor | None = None
    records: tuple[Record, ...] = ()
    sizes: frozenset[Size] = frozenset()
    image: Callable[[int], Tensor] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def details(self) -> Tensor:
        """Features (n, e) for the copying report."""
        return self.features if self.detail is None else self.detail

    @property
    def labels(self) -> tuple[str | None, ...]:
        """Class of each image: the column ``label``, or its sub-folder; None where unknown."""
        found = [record.get("label") for record in self.records] or [None] * len(self)
        return tuple(None if label is None else str(label) for label in found)

    @property
    def licenses(self) -> tuple[str, ...]:
        """License of each image, empty where none is recorded."""
        return tuple(license_of(record) for record in self.records)


def license_of(record: Record) -> str:
    """What a record says of its license, in either spelling."""
    return str(record.get("license") or record.get("licence") or "")


def read_images(
    path: str | Path,
    views: Views,
    *,
    only: Sequence[str] | None = None,
    size: Size | None = None,
    progress: bool = True,
) -> ImageSet:
    """All readable pictures at a path; unreadable ones are named in one warning.

    Args:
        path: folder, tars, zips, parquet files: whatever `open_source` takes.
        views: makes the features.
        only: names of files in the folder that count; None: all.
        size: bring images to this height and width; None: as they are.
        progress: show a bar.

    Raises:
        ValueError: there is no readable picture.
    """
    if only is None:
        source: Source = open_source(path)
    else:
        source = Images([Path(path) / name for name in only], [{"file": name} for name in only])
    return read_source(str(path), source, views, size=size, progress=progress)


def read_source(
    name: str, source: Source, views: Views, *, size: Size | None = None, progress: bool = True
) -> ImageSet:
    """All readable pictures of a source, each brought to ``size`` if one is given."""
    fitted = _Fitted(source, size)
    reader = Reader(fitted, views, SIDE)
    parts, records, small = [torch.empty(0, views.dim)], list[dict[str, Any]](), list[bytes]()
    places, skipped, rows = list[tuple[int, int]](), list[tuple[str, str]](), list[Row]()

    def encode() -> None:
        embeddings, known, pictures = encode_rows(views, rows)
        parts.append(embeddings.float())
        records.extend(known)
        small.extend(pictures)
        rows.clear()

    with progress_bar(len(source), f"reading {name}", progress) as bar:
        for i in range(len(source)):
            read = reader(i)
            if isinstance(read, str):
                skipped.append((reader.name(i), read))
            else:
                places += [(i, j) for j in range(len(read))]
                rows += read
            if len(rows) >= BATCH or reader.full(rows):
                encode()
            bar.update(1)
        encode()
    if skipped:
        warnings.warn(skipped_message(skipped), SkippedPictures, stacklevel=2)
    if not records:
        raise ValueError(f"{name} holds no readable image: give a folder of images")

    def image(row: int) -> Tensor:
        i, j = places[row]
        return to_float(fitted.read(i)[j].image)

    files = tuple(str(r.get("file") or r.get("id") or i) for i, r in enumerate(records))
    return _split(name, torch.cat(parts), views, files, small, records, fitted.sizes, image)


def read_database(
    database: Database | str | Path,
    views: Views,
    *,
    rows: Iterable[int] | None = None,
    size: Size | None = None,
    progress: bool = True,
) -> ImageSet:
    """Pictures of a database, encoded anew.

    Args:
        database: open, or its path.
        views: makes the features.
        rows: which rows; None: all.
        size: as in `read_images`.
        progress: show a bar.

    Raises:
        ValueError: a row has no picture at hand, neither thumbnail nor file.
    """
    opened: Any = database
    name = "the model's database"
    if isinstance(database, (str, Path)):
        name, opened = str(database), open_database(database, "exact")
    if not isinstance(opened, Searchable) and not hasattr(opened, "image"):
        raise ValueError(f"{name} shows no pictures, so that copies of its rows cannot be found")
    try:
        opened.image(0)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no pictures at hand, so that copies of its rows cannot be found: build it "
            f"with thumbnails, or put the pictures back where they were ({error})"
        ) from error
    chosen = list(range(len(opened)) if rows is None else rows)
    records = opened.records(torch.tensor(chosen, dtype=torch.int64))
    source = _Rows(opened, chosen, records, name)
    found = read_source(name, source, views, size=size, progress=progress)
    if len(found) < len(chosen):
        raise ValueError(
            f"{len(chosen) - len(found):,} of {len(chosen):,} rows of {name} have no picture at "
            "hand: build the database with thumbnails, or put the pictures back where they were"
        )
    return found


def planted_copies(images: ImageSet, views: Views, n: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Features (p, v, e) of slightly changed copies of some images, by kind of change.

    Args:
        images: whose copies are made.
        views: makes the features; with mirrored details v = 2, else 1.
        n: copies of each kind, of images evenly spaced over all; fewer where there are fewer.
        seed: of the changes.
    """
    assert images.image is not None
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.linspace(0, len(images) - 1, min(n, len(images))).round().long().tolist()
    found: dict[str, Tensor] = {}
    pictures = [images.image(i) for i in chosen]
    for kind in KINDS:
        copies = [to_bytes(plant(picture, kind, generator)) for picture in pictures]
        _, detail, mirrored, _ = encode_images(views, copies).float().split(views.widths, 1)
        both = [detail, mirrored] if views.mirrored else [detail]
        found[kind] = torch.stack(both, 1).cpu()
    return found


class _Fitted(Source):
    """A source whose images are cut to the shape of ``size`` around their middle and resized."""

    def __init__(self, source: Source, size: Size | None):
        self.source, self.size = source, size
        self.found = set[Size]()

    @property
    def sizes(self) -> frozenset[Size]:
        """Sizes that were read."""
        return frozenset(self.found)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> list[Item]:
        return [Item(self._fit(item.image), item.record) for item in self.source.read(i)]

    def describe(self) -> dict[str, Any]:
        return self.source.describe()

    def _fit(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        self.found.add((h, w))
        if self.size is None or (h, w) == self.size:
            return image
        return fit(image, self.size)


def fit(image: Tensor, size: Size) -> Tensor:
    """An image (c, h, w) cut to a shape around its middle and resized: uint8 (c, *size)."""
    h, w = image.shape[-2:]
    scale = min(h / size[0], w / size[1])
    high, wide = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (h - high) // 2, (w - wide) // 2
    cut = to_float(image[:, top : top + high, left : left + wide])
    resized = torch.nn.functional.interpolate(
        cut[None], size, mode="bicubic", antialias=True, align_corners=False
    )
    return to_bytes(resized[0].clamp(-1, 1))


class _Rows(Source):
    """Rows of a database as a source of pictures."""

    def __init__(self, database: Any, rows: list[int], records: Sequence[Record], name: str):
        self.database, self.rows, self.records, self.title = database, rows, records, name

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"row {self.rows[i]} of {self.title}"

    def read(self, i: int) -> list[Item]:
        return [Item(to_bytes(self.database.image(self.rows[i])), dict(self.records[i]))]

    def describe(self) -> dict[str, Any]:
        return {"kind": "rows", "count": len(self)}


def _split(
    name: str,
    embeddings: Tensor,
    views: Views,
    files: tuple[str, ...],
    small: list[bytes],
    records: list[dict[str, Any]],
    sizes: frozenset[Size],
    image: Callable[[int], Tensor],
) -> ImageSet:
    whole, detail, mirrored, logits = embeddings.split(views.widths, 1)
    return ImageSet(
        name,
        whole.contiguous(),
        files,
        tuple(small),
        detail.contiguous(),
        mirrored.contiguous() if views.mirrored else None,
        logits.contiguous() if logits.shape[1] else None,
        tuple(records),
        sizes,
        image,
    )
