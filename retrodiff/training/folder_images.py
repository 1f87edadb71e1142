"""A folder of pictures as training images: squares of one size, read once, kept as bytes."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.databases.build.encoding import NARROWEST, encode_pictures
from retrodiff.databases.build.ingest import skipped_message
from retrodiff.databases.sources.folders import ImageFolder
from retrodiff.encoders.preprocessing import CenterCrop, ResizeShort
from retrodiff.interfaces import Encoder
from retrodiff.numbers import whole
from retrodiff.pictures.converting import to_bytes, to_float
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.progress import progress_bar


class FolderImages:
    """All readable pictures below a folder, their central squares resized to one size.

    The network is trained on the squares. The encoder sees the whole pictures, as it does when a
    database is built of them. Unreadable files are left out, named in one warning. In memory a
    picture takes 3 * size² bytes.

    Args:
        path: the folder.
        size: side of the images.
        progress: show a bar.

    Raises:
        ValueError: no picture can be read.

    Examples:
        >>> from PIL import Image
        >>> from pathlib import Path
        >>> from retrodiff.training import FolderImages
        >>> Path("photos").mkdir()
        >>> Image.new("RGB", (48, 32)).save("photos/black.png")
        >>> images = FolderImages("photos", size=16, progress=False)
        >>> len(images), images.name(0)
        (1, 'black.png')
    """

    def __init__(self, path: str | Path, size: int, progress: bool = True) -> None:
        self.size = whole("size", size)
        self.source = ImageFolder(path)
        self.numbers: list[int] = []
        """Of the pictures in the source that could be read."""
        squares: list[Tensor] = []
        skipped: list[tuple[str, str]] = []
        hashed = hashlib.sha256(str(self.size).encode())
        with progress_bar(len(self.source), "reading", progress) as bar:
            for i in range(len(self.source)):
                try:
                    (item,) = self.source.read(i)
                    squares.append(to_bytes(squared(item.image, self.size)))
                    self.numbers.append(i)
                    content = (self.source.path / self.source.files[i]).read_bytes()
                    hashed.update(hashlib.sha256(content).digest())
                except UnreadableImage as error:
                    skipped.append((self.source.name(i), str(error)))
                bar.update()
        if not squares:
            raise ValueError(f"{path} holds no readable image: {skipped_message(skipped)}")
        if skipped:
            warnings.warn(skipped_message(skipped), stacklevel=2)
        self.bytes = torch.stack([square.expand(3, -1, -1) for square in squares])
        self._digest = hashed.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> images (b, 3, size, size) in [-1, 1]."""
        return to_float(self.bytes[rows])

    def embed(self, encoder: Encoder, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> embeddings (b, d) of the whole pictures, as a database has them."""
        return encode_pictures(self.source, encoder, [self.numbers[i] for i in rows.tolist()])

    def name(self, row: int) -> str:
        """File of an image, below the folder."""
        return self.source.files[self.numbers[row]]

    def digest(self) -> str:
        """Hash of all files and of the size, in their order."""
        return self._digest


def squared(image: Tensor, size: int) -> Tensor:
    """An image (c, h, w), bytes or floats -> its central square (c, size, size) in [-1, 1].

    Raises:
        UnreadableImage: one side is more than a hundred times the other.
    """
    h, w = image.shape[-2:]
    if max(h, w) > NARROWEST * min(h, w):
        raise UnreadableImage(
            f"{w} x {h} pixels: one side is more than {NARROWEST} times the other"
        )
    return to_float(CenterCrop(size).apply(ResizeShort(size).apply(image[None])))[0]
