"""Reads a set of images for evaluation: features, file names, and small copies to be shown."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.databases import ImageFolder, Searchable, Source, open_database
from retrodiff.databases.build.encoding import encode_here, encode_images
from retrodiff.databases.sources.skipped import SkippedPictures, skipped_message
from retrodiff.interfaces import Database, Encoder
from retrodiff.pictures.converting import to_image
from retrodiff.pictures.thumbnails import thumbnail, to_bytes
from retrodiff.progress import progress_bar

SIDE = 96


@dataclass(frozen=True)
class ImageSet:
    """Images as a metric sees them.

    Args:
        name: where they come from.
        features: (n, d).
        files: n names.
        small: n small copies as JPEG or PNG bytes.
        licenses: n licenses; empty where the source keeps none.
    """

    name: str
    features: Tensor
    files: tuple[str, ...]
    small: tuple[bytes, ...]
    licenses: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.features)


def read_folder(path: str | Path, encoder: Encoder, *, progress: bool = True) -> ImageSet:
    """All readable pictures below a folder; unreadable ones are named in one warning.

    Args:
        path: the folder.
        encoder: makes the features.
        progress: show a bar.
    """
    return read_source(str(path), ImageFolder(path), encoder, progress=progress)


def read_source(name: str, source: Source, encoder: Encoder, *, progress: bool = True) -> ImageSet:
    """All readable pictures of a source."""
    settings = {"batch_size": 64, "shard_rows": 2**62, "thumbnails": SIDE}
    features, files, small = [torch.empty(0, encoder.dim)], list[str](), list[bytes]()
    skipped: list[tuple[str, str]] = []
    with progress_bar(len(source), f"reading {name}", progress) as bar:
        for batch in encode_here(source, encoder, settings, (0, 0), 0):
            features.append(batch.embeddings.float())
            files += [str(r.get("file", i)) for i, r in enumerate(batch.records, len(files))]
            small += batch.thumbnails
            skipped += batch.skipped
            bar.update(batch.next[0] - bar.n)
    if skipped:
        warnings.warn(skipped_message(skipped), SkippedPictures, stacklevel=2)
    if not files:
        raise ValueError(f"{name} holds no readable image")
    return ImageSet(name, torch.cat(features), tuple(files), tuple(small))


def planted_copies(images: ImageSet, encoder: Encoder, n: int = 200, seed: int = 0) -> Tensor:
    """Features (p, d) of slightly cropped copies of some images, to see whether they are found.

    Each copy loses a tenth of its width and height at a random side.

    Args:
        images: whose copies are made.
        encoder: makes the features.
        n: copies, evenly spaced over the images; all where there are fewer.
        seed: of the crops.
    """
    generator = torch.Generator().manual_seed(seed)
    step = max(1, len(images) // n)
    copies = []
    for small in images.small[::step][:n]:
        image = to_image(small)
        h, w = image.shape[-2:]
        high, wide = max(1, round(0.9 * h)), max(1, round(0.9 * w))
        top = int(torch.randint(h - high + 1, (), generator=generator))
        left = int(torch.randint(w - wide + 1, (), generator=generator))
        copies.append(image[:, top : top + high, left : left + wide])
    return encode_images(encoder, copies).float().cpu()


def read_database(
    path: str | Path, encoder: Encoder, *, progress: bool = True, batch_size: int = 64
) -> ImageSet:
    """The pictures of a database: its own embeddings where they are of this encoder, else anew.

    Rows without a picture at hand, neither thumbnail nor file, cannot be compared and are refused.

    Args:
        path: of the database.
        encoder: makes the features.
        progress: show a bar.
        batch_size: pictures per encoder call.
    """
    database = open_database(path, "exact")
    assert isinstance(database, Searchable)
    features, small = [torch.empty(0, encoder.dim)], list[bytes]()
    same = encoder.fingerprint.disagreement(database.fingerprint) is None
    with progress_bar(len(database), f"reading {path}", progress) as bar:
        for start in range(0, len(database), batch_size):
            rows = range(start, min(start + batch_size, len(database)))
            images = [database.image(row) for row in rows]
            small += [thumbnail(to_bytes(image), SIDE) for image in images]
            if not same:
                features.append(encode_images(encoder, images).float().cpu())
            bar.update(len(rows))
    if same:
        features.append(database.embeddings(torch.arange(len(database))))
    files, licenses = _names(database)
    return ImageSet(str(path), torch.cat(features), files, tuple(small), licenses)


def _names(database: Database) -> tuple[tuple[str, ...], tuple[str, ...]]:
    records = database.records(torch.arange(len(database)))
    files = tuple(str(r.get("file") or r.get("id") or i) for i, r in enumerate(records))
    licenses = tuple(str(r.get("license") or r.get("licence") or "") for r in records)
    return files, licenses if any(licenses) else ()
