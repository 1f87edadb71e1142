"""Rows that may still be among the nearest, kept by approximate scores and settled in float64.

A pass over the rows hands in approximate scores and how far they may stray from the true cosine.
What cannot be among the k best any more is dropped; what is left at the end is scored again from
the stored values. So the result is exact however coarse the pass was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_AT_ONCE = {"cpu": 512, "cuda": 65_536}
"""Candidates scored again at a time; on a CPU their float64 values stay in the cache."""


def float_margin(terms: int) -> float:
    """How far a float32 dot product of two unit vectors strays, norms of the same width included.

    The worst case of so many additions in a row is terms * 2^-24 for the product, half of that for
    a norm; sums in blocks, as every library makes them, stay far below.
    """
    return 2 * (terms + 32) * 2.0**-24


class Candidates:
    """The rows seen so far that may be among the k nearest of each query.

    Args:
        queries: (b, d) unit norm, float64.
        k: neighbors per query.
        margin: how far the scores handed in stray from the true cosine, at most.
        stored: row numbers (n,) -> stored values (n, d), on the queries' device.
    """

    def __init__(self, queries: Tensor, k: int, margin: float, stored: Callable[[Tensor], Tensor]):
        self.queries, self.k, self.margin, self.stored = queries, k, margin, stored
        self.least = queries.new_full((len(queries),), -torch.inf, dtype=torch.float32)
        """(b,) the k-th nearest has at least this true cosine."""
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count, self._limit = 0, 2 * k * len(queries) + 4096

    @property
    def floor(self) -> Tensor:
        """(b,) a score to be handed in that is lower does not belong to one of the k nearest."""
        return self.least - self.margin

    def reached(self, cosine: Tensor) -> None:
        """Takes note of a true cosine (b,) that k rows are known to reach for each query."""
        self.least = torch.maximum(self.least, cosine)

    def add(self, query: Tensor, row: Tensor, score: Tensor) -> None:
        """More candidates (n,); the rows of a query must come in rising order, over all calls."""
        self._found.append((query, row, score))
        self._count += len(row)
        if self._count > self._limit:
            self._prune()
            if self._count > 8 * self.k * len(self.queries) + 4096:
                self._settle()  # so many are nearly equal that only float64 tells them apart
            self._limit = max(self._limit, 2 * self._count)

    def result(self) -> tuple[Tensor, Tensor]:
        """Cosine (b, k) float32 and rows (b, k), nearest first; ties go to the lowest row."""
        self._prune()
        self._settle()
        _, row, score = self._found[0]
        return score.view(-1, self.k), row.view(-1, self.k)

    def _prune(self) -> None:
        """Drops what the k-th best score of its query rules out."""
        query, row, score = self._joined()
        self._note(query, score, *_ranked(query, score, len(self.queries)))
        self._keep(query, row, score, score >= self.floor[query])

    def _settle(self) -> None:
        """Scores the candidates in float64 and keeps the k best of each query."""
        query, row, score = self._joined()
        at_once = _AT_ONCE.get(row.device.type, 512)
        for at in torch.arange(len(row), device=row.device).split(at_once):
            values = self.stored(row[at]).double()
            dots = self.queries[query[at]].mul_(values).sum(1)
            score[at] = (dots / values.norm(dim=1).clamp_min(1e-12)).float()
        order, place = _ranked(query, score, len(self.queries))
        self._note(query, score, order, place)
        self._keep(query, row, score, order[place < self.k])

    def _note(self, query: Tensor, score: Tensor, order: Tensor, place: Tensor) -> None:
        kth = order[place == self.k - 1]
        reached = torch.full_like(self.least, -torch.inf)
        self.reached(reached.scatter_(0, query[kth], score[kth] - self.margin))

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        query, row, score = (torch.cat(part) for part in zip(*self._found, strict=True))
        return query, row, score

    def _keep(self, query: Tensor, row: Tensor, score: Tensor, which: Tensor) -> None:
        self._found = [(query[which], row[which], score[which])]
        self._count = len(self._found[0][0])


def _ranked(query: Tensor, score: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Order (n,) by query, then falling score, and each one's place among those of its query."""
    order = score.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    counts = torch.bincount(query, minlength=b)
    first = (counts.cumsum(0) - counts)[query[order]]
    return order, torch.arange(len(order), device=order.device) - first
