"""Which k rows of the database a query gets: the nearest ones, or a choice among them."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Neighbors, Query, Retriever, unit


@dataclass(frozen=True)
class NearestNeighbors(Retriever):
    """The k rows of highest cosine (ξ_k of Blattmann et al. 2022)."""

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Nearest first."""
        return database.search(query, k)


@dataclass(frozen=True)
class RandomOfTop(Retriever):
    """k rows drawn without order from the nearest ``top`` ones: variety for one prompt.

    The paper's class-conditional mode draws like this. Randomness comes from ``query.generator``.

    Args:
        retriever: what ranks the rows.
        top: l, how many rows to draw from; at least k.
    """

    retriever: Retriever
    top: int

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k of the top rows, nearest first among the drawn."""
        if self.top < k:
            raise ValueError(f"top={self.top} rows are fewer than k={k}: raise top to k or more")
        pool = self.retriever.retrieve(query, database, self.top)
        chance = torch.rand(pool.indices.shape, generator=query.generator)
        return pool.take(chance.argsort(-1)[..., :k].sort(-1).values)


@dataclass(frozen=True)
class Diverse(Retriever):
    """Near to the query but not to each other: maximal marginal relevance.

    Carbonell & Goldstein 1998. Greedily takes the row that maximizes
    ``(1 - diversity) * cos(row, query) - diversity * max cos(row, taken)``.

    Args:
        retriever: what ranks the rows.
        diversity: 0 keeps the ranking, 1 ignores the query after the first row.
        top: how many of the nearest rows are looked at.
    """

    retriever: Retriever
    diversity: float
    top: int

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k of the top rows, in the order in which they were taken."""
        if self.top < k:
            raise ValueError(f"top={self.top} rows are fewer than k={k}: raise top to k or more")
        pool = self.retriever.retrieve(query, database, self.top)
        rows = unit(pool.embeddings.float())
        between = rows @ rows.transpose(-1, -2)
        taken = pool.similarity.argmax(-1, keepdim=True)
        for _ in range(k - 1):
            gathered = between.gather(
                -1, taken.unsqueeze(-2).expand(*between.shape[:-1], taken.shape[-1])
            )
            score = (1 - self.diversity) * pool.similarity - self.diversity * gathered.amax(-1)
            score = score.scatter(-1, taken, float("-inf"))
            taken = torch.cat([taken, score.argmax(-1, keepdim=True)], -1)
        return pool.take(taken)


@dataclass(frozen=True)
class ExcludeSelf(Retriever):
    """Never the query's own row: for training images that are themselves in the database.

    Args:
        retriever: what ranks the rows.
    """

    retriever: Retriever

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows other than ``query.ids``; queries without an id get their k nearest."""
        if query.ids is None:
            return self.retriever.retrieve(query, database, k)
        ids = query.ids.reshape(-1, *[1] * (query.embedding.ndim - 1))
        return _first_allowed(self.retriever, query, database, k, 1, lambda n: n.indices != ids)


@dataclass(frozen=True)
class ExcludeGroup(Retriever):
    """No row that shares a metadata value with the query's own row, such as the source file.

    Args:
        retriever: what ranks the rows.
        column: metadata column that names the group.
    """

    retriever: Retriever
    column: str

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows of other groups; queries without an id get their k nearest."""
        if query.ids is None:
            return self.retriever.retrieve(query, database, k)
        known = query.ids >= 0
        own: list[object] = [object()] * len(query)
        for row, record in zip(
            known.nonzero().flatten().tolist(),
            database.records(query.ids[known]),
            strict=True,
        ):
            if self.column not in record:
                raise ValueError(
                    f"column {self.column!r} is not in the database's records, which have "
                    f"{', '.join(sorted(record))}"
                )
            own[row] = record[self.column]

        def allowed(found: Neighbors) -> Tensor:
            flat = database.records(found.indices.reshape(-1))
            per_query = len(flat) // len(query)
            groups = [r[self.column] != own[i // per_query] for i, r in enumerate(flat)]
            return torch.tensor(groups).view(found.indices.shape)

        return _first_allowed(self.retriever, query, database, k, k, allowed)


@dataclass(frozen=True)
class ExcludeDuplicates(Retriever):
    """No row as similar to the query as a copy would be.

    Args:
        retriever: what ranks the rows.
        threshold: rows of a cosine above this are taken for copies.
    """

    retriever: Retriever
    threshold: float

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """The k nearest rows at or below the threshold."""
        return _first_allowed(
            self.retriever, query, database, k, k, lambda n: n.similarity <= self.threshold
        )


def _first_allowed(
    retriever: Retriever,
    query: Query,
    database: Database,
    k: int,
    extra: int,
    allowed: Callable[[Neighbors], Tensor],
) -> Neighbors:
    """The first k allowed rows of every query, looking further until all have them."""
    total = len(database)
    while True:
        reach = min(k + extra, total)
        found = retriever.retrieve(query, database, reach)
        keep = allowed(found)
        if bool((keep.sum(-1) >= k).all()):
            # A stable sort of "not allowed" brings the allowed rows forward in their own order.
            return found.take((~keep).int().argsort(dim=-1, stable=True)[..., :k])
        if reach == total:
            least = int(keep.sum(-1).min())
            raise ValueError(
                f"k={k} neighbors were asked for, but after exclusion only {least} of the "
                f"database's {total} rows are left for some query: lower k or add rows"
            )
        extra *= 4
