"""Several databases of one encoder, searched as one; each keeps its own index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.searchable import Searchable
from retrodiff.indexes import Vectors
from retrodiff.indexes.vectors import row_norms
from retrodiff.interfaces import Record


class Union(Searchable):
    """The rows of several databases, one database after the other.

    Args:
        *databases: made by the same encoder.
    """

    def __init__(self, *databases: Searchable):
        if not databases:
            raise ValueError("a union of no databases: give at least one")
        first = databases[0].fingerprint
        for i, database in enumerate(databases[1:], 1):
            if (what := first.disagreement(database.fingerprint)) is not None:
                raise ValueError(f"databases 0 and {i} of the union disagree: {what}")
        self.databases = databases
        vectors = _UnionVectors(databases)
        digest = hashlib.sha256("".join(d.fingerprint.rows for d in databases).encode())
        super().__init__(vectors, replace(first, rows=digest.hexdigest()[:32]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about the rows of any of them."""
        return tuple(dict.fromkeys(name for d in self.databases for name in d.columns))

    def records(self, indices: Tensor) -> list[Record]:
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
        tables = [d.table([n for n in names if n in d.columns]) for d in self.databases]
        filled = [
            table if table.column_names else pa.table({names[0]: pa.nulls(len(d))})
            for table, d in zip(tables, self.databases, strict=True)
        ]
        return pa.concat_tables(filled, promote_options="permissive").select(list(names))

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        [(database, _, rows)] = self._split(self._checked(torch.tensor([index])))
        return database.image(int(rows))

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        similarity, indices, start = [], [], 0
        for database in self.databases:
            s, i = database._find(queries, min(k, len(database)))
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


class _UnionVectors(Vectors):
    def __init__(self, databases: Sequence[Searchable]):
        self.databases = databases
        self.dim = databases[0].vectors.dim

    def __len__(self) -> int:
        return sum(len(database) for database in self.databases)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, len(self), size):
            block = self.rows(torch.arange(start, min(start + size, len(self))))
            yield start, block, row_norms(block)

    def rows(self, indices: Tensor) -> Tensor:
        out, start = torch.empty(len(indices), self.dim), 0
        for database in self.databases:
            at = ((indices >= start) & (indices < start + len(database))).nonzero().flatten()
            if len(at):
                out[at] = database.embeddings(indices[at] - start)
            start += len(database)
        return out
