"""Copies of the rows in a narrow form, for a first pass, and how far they stray from the rows.

Bytes need rows without outstanding channels, which CLIP's embeddings have: such a copy is turned by
a random rotation, and queries with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.indexes.candidates import float_margin
from retrodiff.indexes.vectors import ORDINARY, Vectors, unit_rows
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What a copy may be held in."""

BLOCK = 65_536
"""Rows that are copied at a time."""


@dataclass(frozen=True)
class Narrow:
    """Some rows in a narrow form.

    Args:
        values: (n, d) in one of `STORAGE`.
        scale: (n,) what makes unit rows of the values.
        stray: how far these lie from the unit rows they stand for, at most.
        lossless: whether the values are the very ones that are stored.
        turn: (d, d) the rotation that rows and queries were turned by; None: none.
    """

    values: Tensor
    scale: Tensor
    stray: float
    lossless: bool
    turn: Tensor | None = None

    @classmethod
    @full_precision()
    def copy_of(
        cls, vectors: Vectors, storage: str, device: torch.device, progress: bool = False
    ) -> Narrow:
        """All rows, on a device."""
        dtype, m, d = STORAGE[storage], len(vectors), vectors.dim
        values = torch.empty(m, d, dtype=dtype, device=device)
        scale = torch.empty(m, dtype=torch.float32, device=device)
        turn = rotation(d).to(device) if dtype == torch.int8 else None
        strays, lossless = [0.0], True
        with progress_bar(m, f"copy in {storage}", progress, unit="rows") as bar:
            for start, rows, norms in vectors.blocks(BLOCK):
                part, n = cls.of(moved(rows, device), norms.to(device), dtype, turn), len(rows)
                values[start : start + n], scale[start : start + n] = part.values, part.scale
                strays.append(part.stray)
                lossless = lossless and part.lossless
                bar.update(n)
        return cls(values, scale, max(strays), lossless, turn)

    @classmethod
    def of(
        cls, rows: Tensor, norms: Tensor, dtype: torch.dtype, turn: Tensor | None = None
    ) -> Narrow:
        """Stored rows (n, d) with their norms (n,)."""
        if dtype == torch.float16:
            values = rows.to(dtype)
            if torch.equal(values.to(rows.dtype), rows):
                return cls(values, norms.clamp_min(ORDINARY[0]).reciprocal(), 0.0, True)
        unit = unit_rows(rows, norms)
        scale = torch.ones_like(norms, dtype=torch.float32)
        turning = 0.0
        if turn is not None:
            unit = unit @ turn
            turning = float_margin(len(turn)) * len(turn) ** 0.5
        if dtype == torch.int8:
            scale = unit.abs().amax(1).clamp_min(1e-12) / 127
            values = (unit / scale[:, None]).round().to(dtype)
        else:
            values = unit.to(dtype)
        stray = (unit - values.float() * scale[:, None]).norm(dim=1).max()
        return cls(values, scale, float(stray) + turning, False, turn)

    def turned(self, queries: Tensor) -> Tensor:
        """Queries (b, d) as the rows are."""
        return queries if self.turn is None else queries @ self.turn.to(queries.dtype)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, values (n, d) and scale (n,), at most ``size`` rows at a time."""
        for start in range(0, len(self.values), size):
            yield start, self.values[start : start + size], self.scale[start : start + size]


def rotation(d: int) -> Tensor:
    """A random rotation (d, d), the same for every d."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(d, d, generator=g, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(drawn).Q.float()


def moved(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on the device, by way of page-locked memory to a GPU."""
    if device.type == "cuda" and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)
