"""Finds the true nearest neighbors: the default, and the oracle that other indexes answer to.

Rows stream through in blocks. A first pass in float32 looks only at the maximum of each tile of
scores; what may still be among the k best is scored again in float64. So the result is exact,
independent of block size and batch, and no matrix of queries x rows is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.indexes.vectors import Vectors, check_search
from retrodiff.interfaces import Index

_TILE = 64
_MARGIN = 1e-5  # float32 dot products of unit vectors stray by less than this


@dataclass(frozen=True)
class Exact:
    """Recipe of the exact index.

    Args:
        block: rows scored at a time.
    """

    block: int = 8192
    name = "exact"

    def build(self, vectors: Vectors, progress: bool = False) -> ExactIndex:
        """The index over these vectors; nothing is computed or copied."""
        del progress
        return ExactIndex(vectors, self.block)

    def load(self, folder: Path, vectors: Vectors) -> ExactIndex:
        """The same as `build`: there is nothing to load."""
        del folder
        return self.build(vectors)


class ExactIndex(Index):
    """Cosine against every stored row; ties go to the lowest row number."""

    def __init__(self, vectors: Vectors, block: int):
        self.vectors, self.block = vectors, block

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
        visible = len(self.vectors) - (0 if hidden is None else len(hidden))
        check_search(queries, k, visible, self.vectors.dim)
        parts = [self._search(part, k, hidden) for part in queries.split(1024)]
        if not parts:
            return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _search(self, queries: Tensor, k: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        device, queries = queries.device, queries.detach().cpu()
        b, wide = len(queries), self.block + -self.block % _TILE
        exact = queries.double()
        exact = exact / exact.norm(dim=1, keepdim=True).clamp_min(1e-12)
        transposed = exact.float().T.contiguous()
        best = _Best(self.vectors, exact, k)
        block = torch.empty(self.block, self.vectors.dim)
        scores = torch.full((wide, b), -torch.inf)
        for start, rows, norms in self.vectors.blocks(self.block):
            n = len(rows)
            tiles = -(-n // _TILE)
            scale = norms.clamp_min(1e-12).reciprocal().unsqueeze(1)
            block[:n].copy_(rows)
            if b > self.vectors.dim:  # scale what is smaller
                block[:n] *= scale
            torch.mm(block[:n], transposed, out=scores[:n])
            if b <= self.vectors.dim:
                scores[:n] *= scale
            scores[n : tiles * _TILE] = -torch.inf
            if hidden is not None:
                inside = hidden[(hidden >= start) & (hidden < start + n)]
                scores[inside - start] = -torch.inf
            best.add(scores[: tiles * _TILE].view(tiles, _TILE, b), start)
        similarity, indices = best.result()
        return similarity.to(device), indices.to(device)


class _Best:
    """The candidates for the k best rows of each query, among the rows seen so far."""

    def __init__(self, vectors: Vectors, queries: Tensor, k: int):
        self.vectors, self.queries, self.k = vectors, queries, k
        self.floor = queries.new_full((len(queries),), -torch.inf, dtype=torch.float32)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count = 0

    def add(
        self,
        scores: Tensor,  # (tiles, tile, b), in the order of the rows
        start: int,
    ) -> None:
        """Keeps the rows that may be among the best."""
        maxima = scores.amax(1)
        if len(maxima) >= self.k:
            # k tiles reach this value, so k rows do.
            bound = maxima.topk(self.k, dim=0).values[-1] - 2 * _MARGIN
            self.floor = torch.maximum(self.floor, bound)
        tile, query = (maxima >= self.floor).nonzero(as_tuple=True)
        chosen = scores[tile, :, query]
        keep = (chosen >= self.floor[query, None]) & (chosen > -torch.inf)
        i, j = keep.nonzero(as_tuple=True)
        self.found.append((query[i], start + tile[i] * scores.shape[1] + j, chosen[i, j]))
        self.count += len(i)
        if self.count > 32 * self.k * len(self.queries) + 100_000:
            self._settle()

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarity (b, k) and indices (b, k)."""
        self._settle()
        _, row, score = self.found[0]
        return score.view(-1, self.k), row.view(-1, self.k)

    def _settle(self) -> None:
        """Scores the candidates in float64 and keeps the k best of each query."""
        query, row, score = (torch.cat(part) for part in zip(*self.found, strict=True))
        query, row, score = _prune(query, row, score, self.floor, self.k, len(self.queries))
        exact = torch.empty(len(row))
        for at in torch.arange(len(row)).split(16_384):
            values = self.vectors.rows(row[at]).double()
            dots = (values * self.queries[query[at]]).sum(1)
            exact[at] = (dots / values.norm(dim=1).clamp_min(1e-12)).float()
        keep = _order(query, row, exact, self.k, len(self.queries))
        self.found = [(query[keep], row[keep], exact[keep])]
        self.count = len(keep)
        full = torch.bincount(query[keep], minlength=len(self.queries)) == self.k
        if bool(full.all()):
            kth = exact[keep].view(-1, self.k)[:, -1]
            self.floor = torch.maximum(self.floor, kth - 2 * _MARGIN)


def _prune(
    query: Tensor, row: Tensor, score: Tensor, floor: Tensor, k: int, b: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Drops what lies below the k-th best approximate score of its query, less the margin."""
    keep = _order(query, row, score, k, b)
    kth = torch.full((b,), torch.inf).scatter_reduce(0, query[keep], score[keep], "amin")
    short = torch.bincount(query[keep], minlength=b) < k
    bound = torch.where(short, -torch.inf, kth - 2 * _MARGIN)
    left = score >= torch.maximum(bound, floor)[query]
    return query[left], row[left], score[left]


def _order(query: Tensor, row: Tensor, score: Tensor, k: int, b: int) -> Tensor:
    """Positions of the k best of each query: by query, falling score, rising row."""
    order = row.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    counts = torch.bincount(query, minlength=b)
    first = (counts.cumsum(0) - counts)[query[order]]
    return order[torch.arange(len(order)) - first < k]
