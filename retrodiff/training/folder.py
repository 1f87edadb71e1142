"""A folder of pictures as training images: squares of one size, read once, kept as bytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.databases.images import UnreadableImage, read_image, to_bytes, to_float
from retrodiff.databases.ingest import skipped_message
from retrodiff.databases.sources import ImageFolder
from retrodiff.encoders.preprocessing import CenterCrop, ResizeShort
from retrodiff.progress import progress_bar


class FolderImages:
    """All readable pictures below a folder, their central squares resized to one size.

    Unreadable files are left out, named in one warning. In memory a picture takes 3 * size² bytes.

    Args:
        path: the folder.
        size: side of the images.
        progress: show a bar.
    """

    def __init__(self, path: str | Path, size: int, progress: bool = True) -> None:
        source = ImageFolder(path)
        images: list[Tensor] = []
        skipped: list[tuple[str, str]] = []
        with progress_bar(len(source), "reading", progress) as bar:
            for i in range(len(source)):
                try:
                    images += [to_bytes(squared(item.image, size)) for item in source.read(i)]
                except UnreadableImage as error:
                    skipped.append((source.name(i), str(error)))
                bar.update()
        if not images:
            raise ValueError(f"{path} holds no readable image: {skipped_message(skipped)}")
        if skipped:
            warnings.warn(skipped_message(skipped), stacklevel=2)
        self.bytes = torch.stack(images)

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> images (b, 3, size, size) in [-1, 1]."""
        return to_float(self.bytes[rows])


def squared(image: Tensor, size: int) -> Tensor:
    """An image (c, h, w), bytes or floats -> its central square (c, size, size) in [-1, 1]."""
    floats = to_float(image) if image.dtype == torch.uint8 else image
    return CenterCrop(size).apply(ResizeShort(size).apply(floats[None]))[0]


def read_square(file: str | Path, size: int) -> Tensor:
    """A picture file as (3, size, size) in [-1, 1]."""
    try:
        return squared(read_image(file), size)
    except UnreadableImage as error:
        raise ValueError(f"{file}: {error}") from error
