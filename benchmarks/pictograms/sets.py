"""The pictogram sets that ``data.py`` wrote, in memory: pictures, and what is known of each."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STYLES = ("noto", "fluent", "twemoji", "openmoji")
CLIPART = "clipart"
"""Drawings of many hands beside the four sets, where ``clipart.py`` has fetched them."""


def styled(title: str, style: str) -> list[str]:
    """Captions that name the style of a picture."""
    return [f"{title}, {style} style", f"{style} {title}", f"{title} in the style of {style}"]


@dataclass(frozen=True, eq=False)
class Pictograms:
    """Pictures (n, 3, 64, 64) in bytes and a record for each."""

    images: Tensor
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Pictograms:
        """All sets that are in a folder, one after the other, and clip art behind them."""
        import pyarrow.parquet as pq
        from PIL import Image

        images: list[Tensor] = []
        rows: list[dict[str, Any]] = []
        there = [n for n in (*STYLES, CLIPART) if (folder / f"{n}.parquet").exists()]
        for style in there:
            for row in pq.read_table(folder / f"{style}.parquet").to_pylist():
                with Image.open(io.BytesIO(row.pop("image"))) as picture:
                    pixels = np.array(picture.convert("RGB"))
                images.append(torch.from_numpy(pixels).permute(2, 0, 1))
                rows.append(row)
        return cls(torch.stack(images), rows)

    def where(self, wanted: Callable[[dict[str, Any]], bool]) -> Tensor:
        """Numbers of the pictures whose record is wanted."""
        return torch.tensor([i for i, row in enumerate(self.rows) if wanted(row)])

    def names(self, i: int) -> list[str]:
        """Title and keywords of a picture."""
        row = self.rows[i]
        return [
            name for name in dict.fromkeys([row["title"], *row["keywords"].split(", ")]) if name
        ]

    def phrasings(self, i: int) -> list[str]:
        """Captions of a picture: the title in several forms, and each keyword."""
        title, *keywords = self.names(i)
        both = [f"{title}, {', '.join(keywords[:3])}"] if keywords else []
        return [title, f"a {title}", f"picture of {title}", *both, *keywords]
