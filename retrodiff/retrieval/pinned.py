"""A retriever with neighbors chosen by hand: some rows always, some rows never."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Neighbors, Query, Retriever, unit
from retrodiff.numbers import whole
from retrodiff.retrieval.retriever import first_allowed


@dataclass(frozen=True)
class Pinned(Retriever):
    """Chosen rows first, then what another retriever finds; some rows are never taken.

    For neighbors chosen by hand. Row numbers are those of the database that is asked, so they mean
    something else in another one.

    Args:
        retriever: what ranks the other rows.
        rows: taken for every query, in this order, before all others.
        without: never taken.

    Raises:
        ValueError: a row is named twice, or is no row number.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NearestNeighbors, Pinned
        >>> from retrodiff.testing import small_database
        >>> retriever = Pinned(NearestNeighbors(), rows=(5,), without=(2, 3))
        >>> retriever.retrieve(Query(torch.randn(1, 8)), small_database(), 3).indices[0, 0].item()
        5
    """

    retriever: Retriever
    rows: tuple[int, ...] = ()
    without: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named = [whole("a row of Pinned", row, 0) for row in (*self.rows, *self.without)]
        twice = sorted({row for row in named if named.count(row) > 1})
        if twice:
            raise ValueError(f"Pinned names row {twice[0]} twice: pin a row once, or leave it out")

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """The pinned rows, then the other retriever's.

        Raises:
            ValueError: more rows are pinned than k, a row is not in the database, or too few rows
                are left.
        """
        pinned = torch.tensor(self.rows, dtype=torch.int64)
        named = (*self.rows, *self.without)
        if named and max(named) >= len(database):
            raise ValueError(
                f"row {max(named)} is pinned or left out, but the database has {len(database)} "
                "rows: pins belong to one database"
            )
        if len(pinned) > k:
            raise ValueError(
                f"{len(pinned)} rows are pinned, but k={k} are asked for: pin fewer, or raise k"
            )
        first = _own(query, database, pinned)
        if len(pinned) == k:
            return first
        barred = torch.tensor(named, dtype=torch.int64)

        def allowed(query: Query, found: Neighbors) -> Tensor:
            del query
            return ~torch.isin(found.indices, barred.to(found.indices.device))

        rest = k - len(pinned)
        found = first_allowed(self.retriever, query, database, rest, len(named), allowed)
        return Neighbors.cat([first, found]) if len(pinned) else found


def _own(query: Query, database: Database, rows: Tensor) -> Neighbors:
    """The given rows as neighbors of every query."""
    shape = (*query.embedding.shape[:-1], len(rows))
    device = query.embedding.device
    indices = rows.to(device).expand(shape)
    embeddings = database.embeddings(indices)
    similarity = (unit(embeddings.float()) @ query.unit.float().unsqueeze(-1)).squeeze(-1)
    return Neighbors(indices, similarity, embeddings)
