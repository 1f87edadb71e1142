"""A retriever that takes neighbors from every group of a database in turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from retrodiff import Database, Neighbors, Query, Retriever


@dataclass(frozen=True)
class Balanced(Retriever):
    """The nearest row of each group first, then the second nearest of each, and so on.

    Args:
        column: of the database, whose values are the groups.
        reach: times k rows are looked at.

    Example:
        >>> from retrodiff_balanced import Balanced
        >>> Balanced("style")
        Balanced(column='style', reach=8)
    """

    column: str
    reach: int = 8

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Queries (b, d) -> neighbors (b, k), sorted by similarity."""
        pool = database.search(query, min(self.reach * k, len(database)))
        chosen: list[list[int]] = []
        for rows in pool.indices:
            before: Counter[object] = Counter()
            turns: list[tuple[int, int]] = []
            for place, record in enumerate(database.records(rows)):
                group = record.get(self.column)
                turns.append((before[group], place))
                before[group] += 1
            chosen.append(sorted(place for _, place in sorted(turns)[:k]))
        return pool.take(torch.tensor(chosen, device=pool.indices.device))
