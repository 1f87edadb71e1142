"""The photographs of the studies: X to learn from, D to retrieve from, and held-out ones."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scale import Scale
from torch import Tensor

from retrodiff.disk.tensors import map_file, write_hashed_tensors

SIDE = 32
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
GROUPS = {
    "two": ("cat", "dog"),
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicles": ("airplane", "automobile", "ship", "truck"),
    "all": CLASSES,
    "everything": CLASSES,
}
"""Sets of classes by name: how complex X is, and what a database holds. ``all`` and ``everything``
have references of other sizes, see `Points`."""


@dataclass(frozen=True)
class Split:
    """Pictures with their classes.

    Args:
        images: (n, 3, 32, 32) uint8.
        labels: (n,) numbers of `CLASSES`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, group: str) -> Tensor:
        """Numbers of the pictures whose class is in a group."""
        return torch.isin(self.labels, numbers(group)).nonzero().flatten()


@dataclass(frozen=True)
class Photographs:
    """All pictures, divided once: no picture is in two parts."""

    database: Split
    trained: Split
    held_out: Split

    @property
    def reference(self) -> Split:
        """The first half of the held-out pictures: what samples are compared with."""
        half = len(self.held_out) // 2
        return Split(self.held_out.images[:half], self.held_out.labels[:half])


def numbers(group: str) -> Tensor:
    """Numbers of a group's classes."""
    return torch.tensor([CLASSES.index(name) for name in GROUPS[group]])


def open_photographs(scale: Scale, parquet: Path | None, folder: Path) -> Photographs:
    """The pictures of a parquet file with columns image and label; without one, random ones.

    Args:
        scale: how many.
        parquet: its rows are shuffled already, such as CIFAR-10's.
        folder: keeps the decoded pictures.
    """
    sizes = [scale.database, scale.trained, scale.held_out]
    file = folder / "photographs.safetensors"
    if not file.exists():
        made = _random(sum(sizes)) if parquet is None else _decoded(parquet, sum(sizes))
        folder.mkdir(parents=True, exist_ok=True)
        write_hashed_tensors(file, {"images": made.images, "labels": made.labels}, {})
    found = map_file(file, again="delete it").tensors
    images, labels = found["images"].clone(), found["labels"].clone()
    if len(images) != sum(sizes):
        raise ValueError(
            f"{file} has {len(images)} pictures, but {scale.name} takes {sum(sizes)}: take "
            "another folder (--runs)"
        )
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    return Photographs(*(Split(*part) for part in parts))


def crops(images: Tensor, side: int, seed: int = 0) -> Tensor:
    """One square of each picture, at a random place: the database's patches, (n, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(SIDE - side + 1, (len(images), 2), generator=generator)
    squares = images.unfold(2, side, 1).unfold(3, side, 1)
    return squares[torch.arange(len(images)), :, at[:, 0], at[:, 1]].contiguous()


def enlarged(images: Tensor) -> Tensor:
    """Pictures of any side at 32x32, to be shown."""
    if images.shape[-1] == SIDE:
        return images
    return F.interpolate(images.float(), size=SIDE, mode="nearest").to(images.dtype)


def _decoded(parquet: Path, count: int) -> Split:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(parquet, columns=["image", "label"])
    if len(table) < count:
        raise ValueError(f"{parquet} has {len(table)} pictures, but {count} are needed")
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i, value in enumerate(table["image"].slice(0, count).to_pylist()):
        content: Any = value["bytes"] if isinstance(value, dict) else value
        images[i] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    labels = [CLASSES.index(name) for name in table["label"].slice(0, count).to_pylist()]
    return Split(torch.from_numpy(images).movedim(-1, 1).contiguous(), torch.tensor(labels))


def _random(count: int) -> Split:
    """Squares of one color on another, ten kinds: enough to try the code."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    tints = torch.rand(count, 2, 3, 1, 1, generator=generator) * 0.4
    tints[:, 1, 0] += labels.view(-1, 1, 1) * 0.06
    images = tints[:, 0].expand(-1, -1, SIDE, SIDE).clone()
    images[:, :, 8:24, 8:24] = tints[:, 1]
    images += 0.05 * torch.rand(images.shape, generator=generator)
    return Split((images.clamp(0, 1) * 255).byte(), labels)
