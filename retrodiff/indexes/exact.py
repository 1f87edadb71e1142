"""Finds the true nearest neighbors: the default, and the oracle that other indexes answer to.

Rows stream through in blocks. A first pass in float32 looks only at the maximum of each tile of
scores; what may still be among the k best is scored again in float64. So the result is exact,
independent of block size and batch, and no matrix of queries x rows is ever in memory. For many
queries at once the first pass looks at upper bounds from a few principal axes instead, where they
rule out enough (see `projection.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrodiff.indexes.axes import leading_axes
from retrodiff.indexes.candidates import Candidates, float_margin
from retrodiff.indexes.copies import STORAGE, Narrow
from retrodiff.indexes.projection import PAIR, Projection
from retrodiff.indexes.vectors import (
    Vectors,
    in_parts,
    outstanding,
    row_norms,
    unit64,
    unit_rows,
)
from retrodiff.interfaces import Index

if TYPE_CHECKING:
    from retrodiff.indexes.resident import ResidentIndex

_TILE = 64
_QUERIES = 1024  # searched at a time
_ROWS = 1024  # multiplied at a time, so that they stay in the cache
_SCORES = 2**22  # held at a time, likewise
_SAMPLE = 4096  # rows that show where the axes lie
_PROJECTED = (256, 65_536)  # from so many queries and rows on, bounds are worth a try


@dataclass(frozen=True)
class Exact:
    """Recipe of the exact index.

    Args:
        block: rows scored at a time, at most.
        storage: ``float16``, ``bfloat16`` or ``int8``: the first pass reads a copy of the rows in
            this form, held in memory or on the device; the result is exact all the same. None: no
            copy on a CPU, float16 on a GPU.
        device: where the first pass runs, such as ``cuda``; None: on the CPU.

    Examples:
        >>> import torch
        >>> from retrodiff.indexes import Exact, Vectors
        >>> rows = torch.randn(500, 32)
        >>> similarity, found = Exact().build(Vectors([rows])).search(rows[:2], k=5)
        >>> found.shape, found[:, 0].tolist()
        (torch.Size([2, 5]), [0, 1])
    """

    block: int = 32_768
    storage: str | None = None
    device: str | None = None
    name = "exact"

    def build(self, vectors: Vectors, progress: bool = False) -> ExactIndex | ResidentIndex:
        """The index over these vectors; nothing is copied unless storage or device is given.

        Raises:
            ValueError: the storage or the device is not known.
        """
        if self.storage is not None and self.storage not in STORAGE:
            raise ValueError(f"unknown storage {self.storage!r}; known: {', '.join(STORAGE)}")
        device = torch.device(self.device or "cpu")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"exact search runs on cpu or cuda, not on {self.device!r}")
        if device.type != "cpu":
            from retrodiff.indexes.resident import ResidentIndex

            return ResidentIndex.on(vectors, self.storage or "float16", device, progress)
        copy = None
        if self.storage is not None:
            copy = Narrow.copy_of(vectors, self.storage, device, progress)
        return ExactIndex(vectors, self.block, copy)

    def load(self, folder: Path, vectors: Vectors) -> ExactIndex | ResidentIndex:
        """The same as `build`: there is nothing to load."""
        del folder
        return self.build(vectors)


class ExactIndex(Index):
    """Cosine against every stored row; ties go to the lowest row number."""

    def __init__(self, vectors: Vectors, block: int, copy: Narrow | None = None):
        self.vectors, self.block, self.copy = vectors, block, copy
        self._sampled: tuple[Tensor, Tensor] | None = None

    def save(self, folder: Path) -> None:
        """Writes nothing: the vectors are the index."""

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
        exact = unit64(queries.cpu())
        margin, turned = float_margin(self.vectors.dim), exact
        if self.copy is not None:
            margin, turned = margin + self.copy.stray, self.copy.turned(exact)
        best = Candidates(exact, k, margin, self.vectors.rows)
        few, small = _PROJECTED
        sampled = None
        if len(queries) >= few and len(self.vectors) >= small and hidden is None:
            if self.copy is None or self.copy.lossless:
                sampled = self._sample()
        block = min(self.block, max(_TILE, _SCORES // len(queries)))
        first_pass = _Pass(turned.float(), best, block, hidden, sampled)
        for start, rows, scale in self._blocks(block):
            first_pass.block(start, rows, scale)
        return best.result()

    def _blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, values (n, d), and the scale (n,) that makes unit rows of them."""
        if self.copy is not None:
            yield from self.copy.blocks(size)
            return
        for start, rows, norms in self.vectors.blocks(size):
            if outstanding(norms) is None:
                yield start, rows, norms.reciprocal()
            else:
                yield start, unit_rows(rows, norms), torch.ones_like(norms)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Some of the unit rows, and the leading half of their principal axes."""
        if self._sampled is None:
            last = len(self.vectors) - 1
            rows = torch.linspace(0, last, _SAMPLE, dtype=torch.float64, device="cpu").long()
            values = self.vectors.rows(rows.unique())
            sample = unit_rows(values, row_norms(values))
            self._sampled = sample, leading_axes(sample.T @ sample, self.vectors.dim // 2)
        return self._sampled


class _Pass:
    """Scores blocks of rows in float32, and hands in what may be among the best."""

    def __init__(
        self,
        queries: Tensor,  # (b, d) unit norm
        best: Candidates,
        block: int,
        hidden: Tensor | None,
        sampled: tuple[Tensor, Tensor] | None,
    ):
        self.best, self.hidden, self.sampled = best, hidden, sampled
        self.queries, self.transposed = queries, queries.T
        wide = block + -block % _TILE
        held = block if sampled is not None else min(block, _ROWS)
        self.unit = queries.new_empty(held, queries.shape[1])
        self.scores = queries.new_empty(wide, len(queries))
        self.projection: Projection | None = None
        self.planned, self.pause, self.pauses = 0, 0, 1
        if sampled is not None and best.k <= len(sampled[0]):
            cosine = queries @ sampled[0].T
            best.raise_least(cosine.topk(best.k, dim=1).values[:, -1] - best.margin)

    def block(self, start: int, rows: Tensor, scale: Tensor) -> None:
        """The next rows (n, d), and the scale (n,) that makes unit rows of them."""
        scale = scale.unsqueeze(1)
        if self.sampled is not None:
            unit = self.unit[: len(rows)].copy_(rows).mul_(scale)
            if start >= self.planned:
                self._plan(*self.sampled)
                self.planned = 2 * (start + len(rows))  # the more is seen, the more is ruled out
            if self.projection is None or not self._bounded(start, unit, self.projection):
                torch.mm(unit, self.transposed, out=self.scores[: len(unit)])
                self._scored(start, len(rows))
            return
        for i in range(0, len(rows), _ROWS):
            some, factor = rows[i : i + _ROWS], scale[i : i + _ROWS]
            part, score = self.unit[: len(some)].copy_(some), self.scores[i : i + len(some)]
            if len(self.queries) > rows.shape[1]:  # scale what is smaller
                torch.mm(part.mul_(factor), self.transposed, out=score)
            else:
                torch.mm(part, self.transposed, out=score).mul_(factor)
        self._scored(start, len(rows))

    def _scored(self, start: int, n: int) -> None:
        """Hands in what of the scores of n rows may be among the best."""
        tiles, best = self._tiles(start, n), self.best
        maxima = tiles.amax(1)
        if len(maxima) >= best.k and not bool(best.least.isfinite().all()):
            # k tiles reach this value, so k rows do.
            best.raise_least(maxima.topk(best.k, dim=0).values[-1] - best.margin)
        tile, query = (maxima >= best.floor).nonzero(as_tuple=True)
        row, query, score = self._among(tiles, tile, query, best.floor)
        best.add(query, start + row, score)

    def _plan(self, sample: Tensor, axes: Tensor) -> None:
        """Takes the projection that promises the least work by now, if any does."""
        some = slice(None, None, -(-len(self.queries) // 128))
        self.projection = Projection.best(
            axes, sample, self.queries[some], self.best.least[some], len(self.queries)
        )
        if self.projection is not None:
            self.bounding = self.projection.coordinates(self.queries).T
            self.coordinates = self.unit.new_empty(len(self.unit), len(self.bounding))

    def _bounded(self, start: int, unit: Tensor, projection: Projection) -> bool:
        """Looks at bounds first; False, and nothing is done, where they leave too much."""
        if self.pause:
            self.pause -= 1
            return False
        n, b = len(unit), len(self.queries)
        torch.mm(
            projection.coordinates(unit, self.coordinates[:n]), self.bounding, out=self.scores[:n]
        )
        tiles = self._tiles(start, n)
        least = self.best.least - projection.slack
        tile, query = (tiles.amax(1) >= least).nonzero(as_tuple=True)
        if 8 * _TILE * len(tile) <= n * b:
            row, query, _ = self._among(tiles, tile, query, least)
        else:
            row, query = (self.scores[:n] >= least).nonzero(as_tuple=True)
        if 2 * PAIR * len(row) > n * b:  # full products for a while, longer each time
            self.pauses = min(2 * self.pauses, 32)
            self.pause = self.pauses
            return False
        self.pauses = 1
        order = query.argsort(stable=True)
        row, query = row[order], query[order]
        score = pair_products(unit, row, self.queries, query)
        keep = score >= self.best.floor[query]
        self.best.add(query[keep], start + row[keep], score[keep])
        return True

    def _tiles(self, start: int, n: int) -> Tensor:
        """The scores of n rows as (tiles, tile, b), -inf where there is no row to be found."""
        wide = n + -n % _TILE
        self.scores[n:wide] = -torch.inf
        if self.hidden is not None:
            inside = self.hidden[(self.hidden >= start) & (self.hidden < start + n)]
            self.scores[inside - start] = -torch.inf
        return self.scores[:wide].view(-1, _TILE, len(self.queries))

    @staticmethod
    def _among(
        tiles: Tensor, tile: Tensor, query: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the block, queries and scores of what reaches the floor in chosen tiles."""
        chosen = tiles[tile, :, query]
        i, j = ((chosen >= floor[query, None]) & (chosen > -torch.inf)).nonzero(as_tuple=True)
        return tile[i] * _TILE + j, query[i], chosen[i, j]


def pair_products(
    rows: Tensor,  # (m, d)
    row: Tensor,  # (n,)
    queries: Tensor,  # (b, d)
    query: Tensor,  # (n,) rising
) -> Tensor:
    """The products of chosen pairs (n,), float32."""
    if _samples_products():
        starts = torch.zeros(len(queries) + 1, dtype=torch.int64, device=query.device)
        starts[1:] = torch.bincount(query, minlength=len(queries)).cumsum(0)
        return _sampled(starts, row, queries, rows)
    out = rows.new_empty(len(row))
    for at in torch.arange(len(row), device=row.device).split(1024):
        out[at] = (rows[row[at]] * queries[query[at]]).sum(1)
    return out


def _sampled(starts: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        size = (len(left), len(right))
        pairs = torch.sparse_csr_tensor(
            starts, column, left.new_zeros(len(column)), size, check_invariants=False
        )
    return torch.sparse.sampled_addmm(pairs, left, right.T, beta=0.0).values()


@functools.cache
def _samples_products() -> bool:
    """Whether this build of torch has sampled products; without, pairs cost several times more."""
    try:
        kind = {"dtype": torch.float32, "device": "cpu"}
        starts, column = torch.tensor([0, 1, 1], device="cpu"), torch.tensor([1], device="cpu")
        found = _sampled(starts, column, torch.eye(2, **kind), torch.ones(2, 2, **kind))
    except RuntimeError:
        return False
    return found.tolist() == [1.0]
