"""Several databases of one encoder, searched as one; each keeps its own index."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.searchable import Searchable
from retrodiff.indexes.vectors import GatheredVectors
from retrodiff.interfaces import Record


class Union(Searchable):
    """The rows of several databases, one database after the other.

    Without weights a search gives the nearest rows, wherever they lie. With weights every database
    gives its share of each query's k neighbors: ``weights=[3, 1]`` and k = 4 are the three nearest
    of the first and the nearest of the second, sorted by similarity. Similarities stay cosines, and
    the neighbors for k are among those for k + 1. Weights act on searches only: a proposal such as
    `Uniform` still draws every row alike.

    Args:
        *databases: made by the same encoder.
        weights: one positive number per database; only their ratios matter.

    Raises:
        ValueError: there is no database, encoders or scales differ, or the weights do not fit.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.databases import Union
        >>> from retrodiff.testing import small_database
        >>> database = small_database(rows=32)
        >>> both = Union(
        ...     database.subset(range(20)), database.subset(range(20, 32)), weights=[3, 1]
        ... )
        >>> len(both), both.shares(4)
        (32, [3, 1])
    """

    def __init__(self, *databases: Searchable, weights: Sequence[float] | None = None):
        if not databases:
            raise ValueError("a union of no databases: give at least one")
        first = databases[0].fingerprint
        for i, database in enumerate(databases[1:], 1):
            mine, what = database.fingerprint, first.disagreement(database.fingerprint)
            if what is None and mine.scale != first.scale:
                what = f"scale={first.scale!r} against scale={mine.scale!r}"
            if what is not None:
                raise ValueError(
                    f"databases 0 and {i} of the union disagree: {what}: build both with the same "
                    "encoder"
                )
        if weights is not None:
            if len(weights) != len(databases):
                raise ValueError(
                    f"{len(databases)} databases, but {len(weights)} weights: give one for each"
                )
            if not all(0 < weight < math.inf for weight in weights):
                raise ValueError(
                    f"weights={list(weights)}: each must be positive; leave out what shall give "
                    "no neighbor"
                )
        self.databases = databases
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        vectors = _UnionVectors(databases)
        digest = hashlib.sha256("".join(d.fingerprint.rows for d in databases).encode())
        super().__init__(vectors, replace(first, rows=digest.hexdigest()[:32]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about the rows of any of them."""
        return tuple(dict.fromkeys(name for d in self.databases for name in d.columns))

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        found: list[Record] = [{}] * len(indices)
        for database, at, rows in self._split(self._checked(indices)):
            for i, record in zip(at.tolist(), database.records(rows), strict=True):
                found[i] = record
        return found

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order; null where not known."""
        import pyarrow as pa

        names = self.columns if columns is None else columns
        filled = []
        for database in self.databases:
            known = [name for name in names if name in database.columns]
            unknown = pa.table({names[0]: pa.nulls(len(database))})
            filled.append(database.table(known) if known else unknown)
        return pa.concat_tables(filled, promote_options="permissive").select(list(names))

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        [(database, _, rows)] = self._split(self._checked([index]))
        return database.image(int(rows))

    def original(self, index: int) -> Tensor:
        """The picture of a row from its own file, at full size: (3, h, w) in [-1, 1]."""
        [(database, _, rows)] = self._split(self._checked([index]))
        return database.original(int(rows))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the original."""
        [(database, _, rows)] = self._split(self._checked([index]))
        return database.size(int(rows))

    def shares(self, k: int) -> list[int]:
        """How many of k neighbors each database is asked for.

        With weights, one neighbor after the other goes to the database that lies furthest behind
        its share (the method of Webster and Sainte-Laguë), so that k + 1 only adds to k.
        """
        sizes = [len(database) for database in self.databases]
        if self.weights is None:
            return [min(k, size) for size in sizes]
        shares = [0] * len(sizes)
        for _ in range(k):
            behind = [
                weight / (2 * share + 1) if share < size else -1.0
                for weight, share, size in zip(self.weights, shares, sizes, strict=True)
            ]
            shares[behind.index(max(behind))] += 1
        return shares

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        similarity, indices, start = [], [], 0
        for database, share in zip(self.databases, self.shares(k), strict=True):
            if share:
                s, i = database._find(queries, share)
                similarity.append(s)
                indices.append(i + start)
            start += len(database)
        # Stable: the earlier database comes first where two rows are equally near.
        order = torch.cat(similarity, 1).sort(dim=1, descending=True, stable=True)
        chosen = order.indices[:, :k]
        return order.values[:, :k], torch.cat(indices, 1).gather(1, chosen)

    def _split(self, rows: Tensor) -> Iterator[tuple[Searchable, Tensor, Tensor]]:
        """For each database that has some of the rows: their positions, and their numbers there."""
        start = 0
        for database in self.databases:
            at = ((rows >= start) & (rows < start + len(database))).nonzero().flatten()
            if len(at):
                yield database, at, rows[at] - start
            start += len(database)


class _UnionVectors(GatheredVectors):
    def __init__(self, databases: Sequence[Searchable]):
        self.databases = databases
        self.dim = databases[0].vectors.dim

    def __len__(self) -> int:
        return sum(len(database) for database in self.databases)

    def rows(self, indices: Tensor) -> Tensor:
        out, start = torch.empty(len(indices), self.dim), 0
        for database in self.databases:
            at = ((indices >= start) & (indices < start + len(database))).nonzero().flatten()
            if len(at):
                out[at] = database.embeddings(indices[at] - start)
            start += len(database)
        return out
