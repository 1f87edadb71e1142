"""The pictograms in memory: images, names and splits, and how training moves them about."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TRAINED = ("noto", "fluent", "twemoji")
"""Styles that anything is trained on; OpenMoji is not among them."""


@dataclass(frozen=True)
class Pictograms:
    """Pictures (n, 3, 64, 64) uint8 and one record for each."""

    images: Tensor
    records: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.images)

    def of(self, *splits: str) -> Pictograms:
        """Those of some splits."""
        rows = [i for i, record in enumerate(self.records) if record["split"] in splits]
        return Pictograms(self.images[rows], [self.records[i] for i in rows])


def read(folder: Path, styles: Sequence[str] = TRAINED) -> Pictograms:
    """Some styles of what ``data.py`` wrote."""
    import pyarrow.parquet as pq
    from PIL import Image

    images, records = [], []
    for style in styles:
        for record in pq.read_table(folder / f"{style}.parquet").to_pylist():
            with Image.open(io.BytesIO(record.pop("image"))) as picture:
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            records.append(record)
    return Pictograms(torch.stack(images), records)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (b, 3, h, w) -> floats in [-1, 1], each shifted, scaled and half of them mirrored.

    Shifts are up to 3 of 64 pixels, scales 0.85 to 1.05; what comes in at the border is white.
    """
    b = len(images)
    scale = 1 / torch.empty(b).uniform_(0.85, 1.05, generator=generator)
    shift = torch.empty(b, 2).uniform_(-3 / 32, 3 / 32, generator=generator)
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
    grid = F.affine_grid(theta, [b, *images.shape[1:]], align_corners=False)
    ink = 1 - images.float() / 255  # white is 0, so that padding is white
    return 1 - 2 * F.grid_sample(ink, grid, align_corners=False).clamp(0, 1)
