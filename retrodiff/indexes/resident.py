"""Exact search on a GPU, over a copy of the rows that is held there in half precision or bytes.

The first pass reads the copy once for a whole batch of queries and keeps only the maximum of each
tile of rows; tiles that may hold one of the k nearest are scored again, and what may be among the
nearest is settled in float64 from the stored values. How far the copy strays from them is measured
when it is made, so the result is exact. Rows that do not fit on the GPU pass through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.indexes.candidates import Candidates, float_margin
from retrodiff.indexes.copies import BLOCK, STORAGE, Narrow, moved
from retrodiff.indexes.tile_maxima import TILE, tile_maxima
from retrodiff.indexes.vectors import Vectors, in_parts, unit64
from retrodiff.interfaces import Index

_QUERIES = 1024  # searched at a time
_MAXIMA = 2**27  # tile maxima held at a time
_PAIRS = 4096  # tiles scored again at a time
_SPARE = 2 << 30  # bytes of a GPU that are left to others


class ResidentIndex(Index):
    """Cosine against every row of a copy; ties go to the lowest row number.

    Args:
        vectors: the stored rows.
        device: where the first pass runs.
        copy: of all rows, there; None: they pass through the device in each search.
    """

    def __init__(self, vectors: Vectors, device: torch.device, copy: Narrow | None):
        self.vectors, self.device, self.copy = vectors, device, copy

    @classmethod
    def on(
        cls, vectors: Vectors, storage: str, device: torch.device, progress: bool = False
    ) -> ResidentIndex:
        """Copies the rows to the device, if they fit."""
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but torch sees no GPU: leave the device out")
        row = vectors.dim * STORAGE[storage].itemsize + 4
        if not fits(len(vectors) * row, device):
            return cls(vectors, device, None)
        return cls(vectors, device, Narrow.copy_of(vectors, storage, device, progress))

    def save(self, folder: Path) -> None:
        """Writes nothing: the copy is made again from the vectors."""

    def search(
        self,
        queries: Tensor,  # (b, d)
        k: int,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries of any norm -> similarity (b, k) and indices (b, k), nearest first.

        Args:
            queries: (b, d).
            k: neighbors per query.
            hidden: sorted row numbers (h,) that must not be found.
        """
        return in_parts(self._search, self.vectors, queries, k, hidden, _QUERIES)

    def _search(self, queries: Tensor, k: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = unit64(queries.to(self.device))
        # Rows that pass through and are not halves are rounded to halves.
        stray = 2.0**-11 + self.vectors.dim**0.5 * 2.0**-25
        turned = exact
        if self.copy is not None:
            stray, turned = self.copy.stray, self.copy.turned(exact)
        single, narrow = turned.float(), turned.to(self.multiplied_in)
        rounding = float((turned - narrow.double()).norm(dim=1).max())
        # Tensor cores cut off where float32 rounds: twice the margin of its additions.
        margin = stray + 2 * float_margin(self.vectors.dim)
        coarse = margin + rounding * (1 + stray)
        best = Candidates(exact, k, margin, self._stored)
        for start, values, scale in self._chunks(len(queries), hidden):
            maxima = tile_maxima(values, scale, narrow)
            if len(maxima) >= k:  # k tiles reach this value, so k rows do
                best.raise_least(maxima.topk(k, dim=0).values[-1] - coarse)
            tile, query = (maxima >= best.least - coarse).nonzero(as_tuple=True)
            for at in torch.arange(len(tile), device=self.device).split(_PAIRS):
                rows, score = _rescored(values, scale, tile[at], single, query[at])
                keep = (score >= best.floor[query[at], None]) & (score > -torch.inf)
                i, j = keep.nonzero(as_tuple=True)
                best.add(query[at][i], start + rows[i, j], score[i, j])
        return best.result()

    @property
    def multiplied_in(self) -> torch.dtype:
        """What queries are rounded to: on a GPU halves as the rows are, on a CPU float32."""
        if self.device.type == "cpu":
            return torch.float32
        held = torch.float16 if self.copy is None else self.copy.values.dtype
        return torch.float16 if held == torch.int8 else held

    def _chunks(self, b: int, hidden: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, values (n, d) and scale (n,) on the device; the scale of hidden rows is -1."""
        if self.copy is not None:
            for start, values, scale in self.copy.blocks(max(_MAXIMA // b, 1) * TILE):
                yield start, values, _hide(scale, start, hidden)
            return
        for start, rows, norms in self.vectors.blocks(BLOCK):
            here = moved(rows, self.device)
            part = Narrow.of(here, norms.to(self.device), torch.float16)
            yield start, part.values, _hide(part.scale, start, hidden)

    def _stored(self, rows: Tensor) -> Tensor:
        if self.copy is not None and self.copy.lossless:
            return self.copy.values[rows]
        return self.vectors.rows(rows.cpu()).to(self.device)


def fits(size: int, device: torch.device) -> bool:
    """Whether a number of bytes fits into the free memory of a GPU; True on other devices."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size + _SPARE <= free


def _hide(scale: Tensor, start: int, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return scale
    inside = hidden[(hidden >= start) & (hidden < start + len(scale))] - start
    scale = scale.clone()
    scale[inside.to(scale.device)] = -1
    return scale


def _rescored(
    values: Tensor, scale: Tensor, tile: Tensor, queries: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (n, TILE) of tiles (n,), and their float32 scores for one query each."""
    rows = tile[:, None] * TILE + torch.arange(TILE, device=tile.device)
    inside = rows < len(values)
    rows = rows.clamp_max(len(values) - 1)
    factor = torch.where(inside, scale[rows], -1.0)
    # Not a matrix product, which on a GPU may be set to less than float32.
    score = (values[rows].float() * queries[query][:, None]).sum(2) * factor
    return rows, score.masked_fill_(factor < 0, -torch.inf)
