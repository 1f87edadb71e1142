"""Candidates for the nearest rows, kept by approximate scores and ranked in float64.

A pass over the rows hands in approximate scores and how far they may stray from the true cosine.
What cannot be among the k best any more is dropped; what is left at the end is scored again from
the stored values, and ranked before anything is rounded to float32. So the result is exact however
coarse the pass was, also among rows that are equal to the last digit of float32.
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


def shortfall(values: Tensor, queries: Tensor) -> Tensor:
    """How much the cosine of rows and unit queries is less than 1: (n,) float64.

    Half the squared distance of the two unit vectors, so that it also tells apart rows whose cosine
    is 1 to all digits of float64. Exactly 1 where the row or the query is zero.

    Args:
        values: (n, d) stored rows, float32 or narrower.
        queries: (n, d) or (d,) unit norm or zero, float64.
    """
    wide = values.to(torch.float64, copy=True)
    norm = torch.linalg.vector_norm(wide, dim=1)
    zero = (norm == 0) | ~queries.any(-1)
    wide.div_(norm.masked_fill(norm == 0, 1).unsqueeze(1)).sub_(queries)
    return wide.square_().sum(1).mul_(0.5).masked_fill_(zero, 1)


class Candidates:
    """The rows seen so far that may be among the k nearest of each query.

    Args:
        queries: (b, d) unit norm or zero, float64.
        k: neighbors per query.
        margin: how far the scores handed in stray from the true cosine, at most.
        stored: row numbers (n,) -> stored values (n, d), on the queries' device.
    """

    def __init__(self, queries: Tensor, k: int, margin: float, stored: Callable[[Tensor], Tensor]):
        self.queries, self.k, self.margin, self.stored = queries, k, margin, stored
        self.least = queries.new_full((len(queries),), -torch.inf, dtype=torch.float32)
        """(b,) the k-th nearest has at least this true cosine."""
        # Queries, rows, and how much the cosine is less than 1.
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count, self._limit = 0, 2 * k * len(queries) + 4096

    @property
    def floor(self) -> Tensor:
        """(b,) a score to be handed in that is lower does not belong to one of the k nearest."""
        return self.least - self.margin

    def raise_least(self, cosine: Tensor) -> None:
        """Takes note of a true cosine (b,) that k rows are known to reach for each query."""
        self.least = torch.maximum(self.least, cosine)

    def add(self, query: Tensor, row: Tensor, score: Tensor) -> None:
        """More candidates (n,); the rows of a query must come in rising order, over all calls."""
        self._found.append((query, row, 1 - score.double()))
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
        _, row, less = self._found[0]
        return (1 - less).float().view(-1, self.k), row.view(-1, self.k)

    def _prune(self) -> None:
        """Drops what the k-th best score of its query rules out."""
        query, row, less = self._joined()
        self._note(query, less, *_ranked(query, less, len(self.queries)))
        self._keep(query, row, less, 1 - less >= self.floor[query])

    def _settle(self) -> None:
        """Scores the candidates in float64 and keeps the k best of each query."""
        query, row, less = self._joined()
        at_once = _AT_ONCE.get(row.device.type, 512)
        for at in torch.arange(len(row), device=row.device).split(at_once):
            less[at] = shortfall(self.stored(row[at]), self.queries[query[at]])
        order, place = _ranked(query, less, len(self.queries))
        self._note(query, less, order, place)
        self._keep(query, row, less, order[place < self.k])

    def _note(self, query: Tensor, less: Tensor, order: Tensor, place: Tensor) -> None:
        kth = order[place == self.k - 1]
        reached = torch.full_like(self.least, -torch.inf)
        cosine = (1 - less[kth] - self.margin).float()
        self.raise_least(reached.scatter_(0, query[kth], cosine))

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        query, row, less = (torch.cat(part) for part in zip(*self._found, strict=True))
        return query, row, less

    def _keep(self, query: Tensor, row: Tensor, less: Tensor, which: Tensor) -> None:
        self._found = [(query[which], row[which], less[which])]
        self._count = len(self._found[0][0])


def _ranked(query: Tensor, less: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Order (n,) by query, then falling cosine, and each one's place among those of its query."""
    order = less.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    counts = torch.bincount(query, minlength=b)
    first = (counts.cumsum(0) - counts)[query[order]]
    return order, torch.arange(len(order), device=order.device) - first
