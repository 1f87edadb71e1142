"""Cuts pictures into the patches that a database is made of, and remembers where they were.

Blattmann et al. 2022 resize the short side to 1200 and take 2-3 random crops of 256 x 256.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from retrodiff.databases.sources.folders import Item, Source
from retrodiff.numbers import whole
from retrodiff.pictures.converting import to_bytes, to_float
from retrodiff.pictures.decoding import UnreadableImage

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in the resized picture; x2 and y2 are just outside."""

NARROWEST = 50
"""How many times longer than the other one side of a picture may be that is cut into patches."""

LARGEST = 2**28
"""Pixels of the largest resized picture that a record may speak of."""


@dataclass(frozen=True)
class Patchify:
    """A step between a source and a database: one row per patch.

    Args:
        size: side of a patch.
        short_side: the picture's short side after the resize; None: as it is, though never less
            than ``size``.
        n: random patches per picture; None: a grid of all that fit.
        stride: distance of the grid's patches; None: ``size``, so that they touch.
        seed: of the random patches; those of a picture depend on its number only.

    Raises:
        ValueError: both ``n`` and ``stride`` are given, or ``short_side`` is less than ``size``.

    Examples:
        >>> import torch
        >>> from retrodiff.databases import Images, Patchify
        >>> pictures = Images(torch.zeros(1, 3, 64, 96))
        >>> patches = Patchify(size=32).over(pictures).read(0)
        >>> len(patches), patches[0].image.shape
        (6, torch.Size([3, 32, 32]))
    """

    size: int = 256
    short_side: int | None = None
    n: int | None = None
    stride: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "short_side", "n", "stride"):
            if (value := getattr(self, name)) is not None or name == "size":
                object.__setattr__(self, name, whole(name, value))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0))
        if self.n is not None and self.stride is not None:
            raise ValueError(
                f"n={self.n} asks for random patches, stride={self.stride} for a grid: give one"
            )
        if self.short_side is not None and self.short_side < self.size:
            raise ValueError(
                f"short_side={self.short_side} is less than size={self.size}: no patch would fit"
            )

    def over(self, source: Source) -> Source:
        """The patches of a source's pictures."""
        return _Patches(self, source)

    def resize(self, image: Tensor) -> Tensor:
        """A picture (c, h, w) -> uint8 with the short side that patches are cut from."""
        h, w = image.shape[-2:]
        short = self.short_side or max(min(h, w), self.size)
        if short == min(h, w):
            return to_bytes(image)
        scale = short / min(h, w)
        to = (max(round(h * scale), short), max(round(w * scale), short))
        return _resized(image, to)

    def boxes(self, h: int, w: int, picture: int) -> list[Box]:
        """Where the patches of a resized picture lie."""
        if self.n is None:
            step = self.stride or self.size
            corners = [
                (x, y)
                for y in range(0, h - self.size + 1, step)
                for x in range(0, w - self.size + 1, step)
            ]
        else:
            draw = random.Random(f"{self.seed} {picture}")
            corners = [
                (draw.randint(0, w - self.size), draw.randint(0, h - self.size))
                for _ in range(self.n)
            ]
        return [(x, y, x + self.size, y + self.size) for x, y in corners]

    def patches(self, image: Tensor, picture: int = 0) -> tuple[list[Tensor], list[Box], Box]:
        """A picture (c, h, w) -> its patches (c, size, size) as uint8, their boxes, its own box."""
        large = self.resize(image)
        h, w = large.shape[-2:]
        boxes = self.boxes(h, w, picture)
        return [cut(large, box) for box in boxes], boxes, (0, 0, w, h)


def cut(image: Tensor, box: Box) -> Tensor:
    """The part of an image (c, h, w) inside a box."""
    x1, y1, x2, y2 = box
    return image[:, y1:y2, x1:x2].clone()


def cut_record(image: Tensor, record: Mapping[str, Any]) -> Tensor:
    """Cuts the patch that a record refers to from its whole picture (c, h, w)."""
    if record.get("box") is None:
        return image
    w, h = record["resized"]
    if (h, w) != tuple(image.shape[-2:]):
        if not 0 < h * w <= LARGEST:
            raise ValueError(
                f"the record says {w} x {h} pixels, more than {LARGEST}: it is damaged"
            )
        image = _resized(image, (h, w))
    return cut(image, tuple(record["box"]))


def _resized(image: Tensor, to: tuple[int, int]) -> Tensor:
    """An image (c, h, w) of another size, uint8; channel by channel, since floats take much."""
    how: dict[str, Any] = {"mode": "bicubic", "antialias": True}
    return torch.cat(
        [to_bytes(interpolate(to_float(c)[None], to, **how)[0]) for c in image[:, None]]
    )


class _Patches(Source):
    def __init__(self, patchify: Patchify, source: Source):
        self.patchify, self.source = patchify, source

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> list[Item]:
        items = []
        for image, record in self.source.read(i):
            h, w = image.shape[-2:]
            if max(h, w) > NARROWEST * min(h, w):
                raise UnreadableImage(f"{w} x {h} is too narrow to be cut into patches")
            patches, boxes, (_, _, width, height) = self.patchify.patches(image, i)
            for patch, box in zip(patches, boxes, strict=True):
                where = {"box": list(box), "resized": [width, height]}
                items.append(Item(patch, {**record, **where}))
        return items

    def ids(self) -> Iterable[Any] | None:
        return self.source.ids()

    def paths(self) -> Iterable[Path]:
        """The files of the source."""
        return self.source.paths()

    def describe(self) -> dict[str, Any]:
        return {"patchify": asdict(self.patchify), **self.source.describe()}
