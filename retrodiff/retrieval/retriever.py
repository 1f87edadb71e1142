"""Retrievers: choose k rows of the database for each query."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Neighbors, Query, Record, Retriever, unit
from retrodiff.numbers import real, whole
from retrodiff.randomness import uniform


@dataclass(frozen=True)
class NearestNeighbors(Retriever):
    """The k rows of highest cosine (ξ_k of Blattmann et al. 2022).

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> query = Query(database.embeddings(torch.tensor([5])))
        >>> NearestNeighbors().retrieve(query, database, k=4).indices[0, 0].item()
        5
    """

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Nearest first."""
        return database.search(query, k)


@dataclass(frozen=True)
class RandomOfTop(Retriever):
    """k rows drawn without order from the nearest ``top`` ones: variety for one prompt.

    The class-conditional mode of Blattmann et al. 2022 draws like this. Randomness comes from
    ``query.generator``.

    Args:
        retriever: what ranks the rows.
        top: l, how many rows to draw from; at least k.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NearestNeighbors, RandomOfTop
        >>> from retrodiff.testing import small_database
        >>> retriever = RandomOfTop(NearestNeighbors(), top=20)
        >>> retriever.retrieve(Query(torch.randn(2, 8)), small_database(), k=4).indices.shape
        torch.Size([2, 4])
    """

    retriever: Retriever
    top: int

    def __post_init__(self) -> None:
        whole("top", self.top)

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k of the top rows, nearest first among the drawn.

        Raises:
            ValueError: ``top`` is less than k.
        """
        if self.top < k:
            raise ValueError(f"top={self.top} rows are fewer than k={k}: raise top to k or more")
        pool = self.retriever.retrieve(query, database, self.top)
        chance = uniform(query.generator, pool.indices.shape)
        return pool.take(chance.argsort(-1)[..., :k].sort(-1).values)


@dataclass(frozen=True)
class Diverse(Retriever):
    """Rows near to the query but not to each other: maximal marginal relevance.

    Carbonell & Goldstein 1998. Greedily takes the row that maximizes
    ``(1 - diversity) * cos(row, query) - diversity * max cos(row, taken)``.

    Args:
        retriever: what ranks the rows.
        diversity: 0 keeps the ranking, 1 ignores the query after the first row.
        top: how many of the nearest rows are looked at.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import Diverse, NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> retriever = Diverse(NearestNeighbors(), diversity=0.5, top=16)
        >>> retriever.retrieve(Query(torch.randn(2, 8)), small_database(), k=4).indices.shape
        torch.Size([2, 4])
    """

    retriever: Retriever
    diversity: float
    top: int

    def __post_init__(self) -> None:
        real("diversity", self.diversity, 0, 1)
        whole("top", self.top)

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k of the top rows, in the order in which they were taken.

        Raises:
            ValueError: ``top`` is less than k.
        """
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
    """Leaves out the query's own row: for training images that are themselves in the database.

    Args:
        retriever: what ranks the rows.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> query = Query(database.embeddings(torch.tensor([5])), ids=torch.tensor([5]))
        >>> 5 in ExcludeSelf(NearestNeighbors()).retrieve(query, database, k=4).indices
        False
    """

    retriever: Retriever

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows other than ``query.ids``; queries of id -1 get their k nearest.

        Raises:
            ValueError: the query has no ids, or too few rows are left.
        """
        _ids(self, query)

        def allowed(query: Query, found: Neighbors) -> Tensor:
            own = _ids(self, query).to(found.indices.device)
            return found.indices != own.reshape(-1, *[1] * (found.indices.ndim - 1))

        return first_allowed(self.retriever, query, database, k, 1, allowed)


@dataclass(frozen=True)
class ExcludeGroup(Retriever):
    """Leaves out rows that share a metadata value, such as the file, with the query's own row.

    Args:
        retriever: what ranks the rows.
        column: metadata column that names the group.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import ExcludeGroup, NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> query = Query(database.embeddings(torch.tensor([5])), ids=torch.tensor([5]))
        >>> found = ExcludeGroup(NearestNeighbors(), "label").retrieve(query, database, k=4)
        >>> database.records(torch.tensor([5]))[0]["label"] in [
        ...     record["label"] for record in database.records(found.indices[0])
        ... ]
        False
    """

    retriever: Retriever
    column: str

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows of other groups; queries of id -1 get their k nearest.

        Raises:
            ValueError: the query has no ids, the records lack the column, or too few rows are left.
        """
        ids = _ids(self, query).cpu()
        known = ids[ids >= 0].unique()
        group = dict(zip(known.tolist(), map(self._group, database.records(known)), strict=True))

        def allowed(query: Query, found: Neighbors) -> Tensor:
            records = database.records(found.indices.reshape(-1).cpu())
            own = [group.get(row, _NO_GROUP) for row in _ids(self, query).tolist()]
            each = len(records) // len(query)
            other = [self._group(r) != own[i // each] for i, r in enumerate(records)]
            return torch.tensor(other, device=found.indices.device).view(found.indices.shape)

        return first_allowed(self.retriever, query, database, k, k, allowed)

    def _group(self, record: Record) -> object:
        if self.column not in record:
            raise ValueError(
                f"column {self.column!r} is not in the database's records, which have "
                f"{', '.join(sorted(record))}"
            )
        return record[self.column]


@dataclass(frozen=True)
class ExcludeDuplicates(Retriever):
    """Leaves out rows as similar to the query as a copy would be.

    Args:
        retriever: what ranks the rows.
        threshold: rows of a cosine above this are taken for copies.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import ExcludeDuplicates, NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> query = Query(database.embeddings(torch.tensor([5])))  # a copy of row 5
        >>> found = ExcludeDuplicates(NearestNeighbors(), threshold=0.99).retrieve(
        ...     query, database, k=4
        ... )
        >>> 5 in found.indices
        False
    """

    retriever: Retriever
    threshold: float

    def __post_init__(self) -> None:
        real("threshold", self.threshold, -1, 1)

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """The k nearest rows at or below the threshold."""

        def allowed(query: Query, found: Neighbors) -> Tensor:
            del query
            return found.similarity <= self.threshold

        return first_allowed(self.retriever, query, database, k, k, allowed)


_NO_GROUP = object()


def _ids(retriever: Retriever, query: Query) -> Tensor:
    """The rows that the queries are; refused where that is unknown."""
    if query.ids is None:
        raise ValueError(
            f"{type(retriever).__name__} leaves out the queries' own rows, but the query has no "
            "ids: give Query(embedding, ids=rows), -1 for a query that is no row of the database"
        )
    return query.ids


def first_allowed(
    retriever: Retriever,
    query: Query,
    database: Database,
    k: int,
    extra: int,
    allowed: Callable[[Query, Neighbors], Tensor],
) -> Neighbors:
    """The first k allowed rows of every query, of those that a retriever ranks.

    Args:
        retriever: what ranks the rows.
        query: of b images.
        database: where it looks.
        k: rows to give.
        extra: rows to look at beyond k, at first.
        allowed: which of the found rows may be given, of the shape of their indices.

    Queries that have too few are asked again for more, and only they: how far one has to look does
    not change what another gets.

    Raises:
        ValueError: too few rows are allowed.
    """
    total = len(database)
    reach = min(k + extra, total)
    found = retriever.retrieve(query, database, reach)
    keep = allowed(query, found)
    # A stable sort of "not allowed" brings the allowed rows forward in their own order.
    first = found.take((~keep).int().argsort(dim=-1, stable=True)[..., :k])
    enough = (keep.sum(-1) >= k).reshape(len(query), -1).all(-1).cpu()
    if bool(enough.all()):
        return first
    if reach == total:
        least = int(keep.sum(-1).min())
        raise ValueError(
            f"k={k} neighbors were asked for, but after exclusion only {least} of the "
            f"database's {total} rows are left for some query: lower k or add rows"
        )
    missing = (~enough).nonzero().flatten()
    more = first_allowed(retriever, query.rows(missing), database, k, extra * 4, allowed)
    at = missing.to(first.indices.device)
    return dataclasses.replace(
        first,
        indices=first.indices.index_copy(0, at, more.indices),
        similarity=first.similarity.index_copy(0, at, more.similarity),
        embeddings=first.embeddings.index_copy(0, at, more.embeddings),
    )
