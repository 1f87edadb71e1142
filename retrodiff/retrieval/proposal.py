"""Distributions over database rows used as queries in unconditional sampling (p_D)."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from retrodiff.disk.files import given, place
from retrodiff.disk.tensors import map_file, write_hashed_tensors
from retrodiff.interfaces import (
    Database,
    Fingerprint,
    ProposalDistribution,
    Query,
    Retriever,
    unit,
)
from retrodiff.numbers import whole
from retrodiff.randomness import uniform
from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.retrieval.retriever import NearestNeighbors

FORMAT = 1

CLUSTERED = 1 << 17
"""Rows that k-means looks at, drawn at random."""

COUNTED = 1 << 23
"""Row numbers counted at a time, so that a mapped table stays where it is."""


class _Drawing(ProposalDistribution, Protocol):
    """Draws from `support` in proportion to the weights."""

    def propose(self, database: Database, n: int, generator: torch.Generator) -> Query:
        """Pseudo-queries (n,); their ids are the rows they are.

        A search on the cumulative sum, since torch.multinomial refuses more than 2^24 rows.
        """
        rows, weights = self.support(database)
        cumulative = weights.double().cumsum(0)
        point = uniform(generator, (n,), torch.float64) * cumulative[-1]
        chosen = rows[torch.searchsorted(cumulative, point, right=True).clamp_max(len(rows) - 1)]
        source = tuple(f"row {row}" for row in chosen.tolist())
        return Query(database.embeddings(chosen), source, chosen, generator)


@dataclass(frozen=True)
class Uniform(_Drawing):
    """Every row with the same probability; needs no fitting.

    Examples:
        >>> import torch
        >>> from retrodiff.retrieval import Uniform
        >>> from retrodiff.testing import small_database
        >>> query = Uniform().propose(small_database(), 5, torch.Generator().manual_seed(0))
        >>> query.embedding.shape
        torch.Size([5, 8])
    """

    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """All rows, weight 1."""
        return torch.arange(len(database)), torch.ones(len(database), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class NeighborCounts(_Drawing):
    """Each row in proportion to how often it is a neighbor of a training image.

    The p_D of Blattmann et al. 2022.

    Make one with `fit`. It belongs to the database it was fitted on and refuses any other.

    Args:
        rows: (n,) int64, the rows that were ever a neighbor, ascending.
        counts: (n,) int64, how often.
        fingerprint: of the database.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NeighborCounts
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> training = Query(torch.randn(100, 8))
        >>> proposal = NeighborCounts.fit(training, database, k=4)
        >>> int(proposal.counts.sum())
        400
        >>> proposal.propose(database, 5, torch.Generator().manual_seed(0)).embedding.shape
        torch.Size([5, 8])
    """

    rows: Tensor
    counts: Tensor
    fingerprint: Fingerprint

    @classmethod
    def fit(
        cls,
        queries: Query,
        database: Database,
        k: int,
        retriever: Retriever | None = None,
        progress: bool = False,
    ) -> NeighborCounts:
        """Counts the k neighbors of every query; needs nothing but embeddings, so no training."""
        retriever = retriever or NearestNeighbors()
        table = neighbor_table(queries, database, k, retriever, progress=progress)
        return cls.from_table(table, database)

    @classmethod
    def from_table(cls, table: Tensor, database: Database) -> NeighborCounts:
        """Counts the rows in a neighbor table (n, k) that training already has, mapped or not.

        Raises:
            ValueError: the table is empty, or names rows that the database does not have.
        """
        if not table.numel():
            raise ValueError(
                f"the table is empty, {tuple(table.shape)}: where neighbors are found at each "
                "step, count them with NeighborCounts.fit(queries, database, k)"
            )
        counts = torch.zeros(len(database), dtype=torch.int64)
        for part in table.split(max(1, COUNTED // max(1, table[:1].numel()))):
            found = torch.bincount(part.reshape(-1), minlength=len(database))
            if len(found) > len(database):
                raise ValueError(
                    f"the table names row {len(found) - 1} of a database of {len(database)} rows: "
                    "it was made for another one"
                )
            counts += found
        rows = counts.nonzero().flatten()
        return cls(rows, counts[rows], database.fingerprint)

    def __repr__(self) -> str:
        return f"NeighborCounts({len(self.rows)} rows, {int(self.counts.sum())} neighbors)"

    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """The rows ever used and their counts."""
        _check_same(self.fingerprint, database, "NeighborCounts.fit(queries, database, k)")
        return self.rows, self.counts.double()

    def save(self, path: str | Path) -> None:
        """One safetensors file with the fingerprint in its header."""
        header = {"format": str(FORMAT), "fingerprint": json.dumps(vars(self.fingerprint))}
        write_hashed_tensors(place(path), {"rows": self.rows, "counts": self.counts}, header)

    @classmethod
    def load(cls, path: str | Path) -> NeighborCounts:
        """The proposal in a file written by `save`.

        Raises:
            ValueError: the file is damaged, or of another format.
        """
        again = "fit the proposal again"
        found = map_file(given(path), again=again)
        if found.metadata.get("format") != str(FORMAT):
            raise ValueError(
                f"{path} has format {found.metadata.get('format')!r:.40}, but this version reads "
                f"proposals of format {FORMAT}"
            )
        try:
            fingerprint = Fingerprint.from_json(json.loads(found.metadata["fingerprint"]))
            rows, counts = found.tensors["rows"].clone(), found.tensors["counts"].clone()
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no proposal ({error}): {again}") from None
        whole = rows.dtype == counts.dtype == torch.int64
        if not whole or rows.ndim != 1 or rows.shape != counts.shape or not len(rows):
            raise ValueError(f"{path} holds no counts of rows: {again}")
        if int(rows[0]) < 0 or bool((rows.diff() <= 0).any()) or int(counts.min()) < 1:
            raise ValueError(f"{path} is damaged (rows and counts out of range): {again}")
        return cls(rows, counts, fingerprint)


@dataclass(frozen=True, eq=False)
class Instances(_Drawing):
    """A few rows that stand for the whole database, each drawn alike (IC-GAN).

    Casanova et al. 2021 keep the instances nearest to the centers of a k-means clustering for
    sampling. Make one with `fit`; it refuses any other database.

    Args:
        rows: (n,) int64, ascending.
        fingerprint: of the database.

    Examples:
        >>> import torch
        >>> from retrodiff.retrieval import Instances
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> instances = Instances.fit(database, count=5)
        >>> query = instances.propose(database, 3, torch.Generator().manual_seed(0))
        >>> len(instances.rows), len(query)
        (5, 3)
    """

    rows: Tensor
    fingerprint: Fingerprint

    @classmethod
    def fit(cls, database: Database, count: int, seed: int = 0, rounds: int = 20) -> Instances:
        """The rows nearest to the centers of spherical k-means; at most ``count`` of them.

        Args:
            database: of more rows than ``count``.
            count: clusters.
            seed: of the first centers.
            rounds: of assigning rows and moving centers.

        Raises:
            ValueError: more instances than rows.
        """
        count, total = whole("count", count), len(database)
        if count > total:
            raise ValueError(
                f"count={count} instances of a database of {total} rows: ask for fewer, or use "
                "Uniform()"
            )
        generator = torch.Generator().manual_seed(seed)
        looked_at = torch.randperm(total, generator=generator)[:CLUSTERED]
        points = unit(database.embeddings(looked_at).float())
        centers = points[:count]
        for _ in range(rounds):
            own = (points @ centers.T).argmax(1)
            sums = torch.zeros_like(centers).index_add_(0, own, points)
            centers = torch.where(sums.any(1, keepdim=True), unit(sums), centers)
        rows = looked_at[(centers @ points.T).argmax(1)].unique()
        return cls(rows, database.fingerprint)

    def __repr__(self) -> str:
        return f"Instances({len(self.rows)} rows)"

    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """The rows, weight 1."""
        _check_same(self.fingerprint, database, "Instances.fit(database, count)")
        return self.rows, torch.ones(len(self.rows), dtype=torch.float64)


@dataclass(frozen=True)
class TopM(_Drawing):
    """The m rows of highest weight, drawn uniformly: quality for diversity.

    Blattmann et al. 2022, section 3.3. Give exactly one of ``fraction`` and ``rows``.

    Args:
        proposal: what weighs the rows.
        fraction: m as a fraction of the proposal's support (0.01 in the paper).
        rows: m as an absolute number.
        weighted: keep the proposal's weights among the m instead of drawing uniformly.

    Raises:
        ValueError: not exactly one of ``fraction`` and ``rows`` is given, or it is out of range.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NeighborCounts, TopM
        >>> from retrodiff.testing import small_database
        >>> database = small_database()
        >>> counts = NeighborCounts.fit(Query(torch.randn(100, 8)), database, k=4)
        >>> rows, weights = TopM(counts, rows=10).support(database)
        >>> len(rows)
        10
    """

    proposal: ProposalDistribution
    fraction: float | None = None
    rows: int | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.rows is None):
            raise ValueError(
                f"TopM takes exactly one of fraction and rows, got fraction={self.fraction} and "
                f"rows={self.rows}"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}, but it lies in (0, 1]")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows}, but at least one row must be kept")

    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """The m heaviest rows; ties go to the lower row number."""
        rows, weights = self.proposal.support(database)
        if self.fraction is not None:
            m = max(1, round(self.fraction * len(rows)))
        else:
            m = min(self.rows or 1, len(rows))
        kept = _heaviest(weights, m)
        weights = weights[kept] if self.weighted else torch.ones(m, dtype=torch.float64)
        return rows[kept], weights


def _check_same(mine: Fingerprint, database: Database, again: str) -> None:
    """Refuses a database that is not the one a proposal was fitted on."""
    theirs = database.fingerprint
    difference = mine.disagreement(theirs)
    if difference is None and mine.rows != theirs.rows:
        difference = f"rows={mine.rows!r} against rows={theirs.rows!r}"
    if difference is not None:
        raise ValueError(
            f"the proposal was fitted on another database ({difference}): fit it again with "
            f"{again}, or use Uniform()"
        )


def _heaviest(weights: Tensor, m: int) -> Tensor:
    """Positions (m,) of the largest weights, by falling weight, then by position.

    The order of a stable sort, without sorting the millions that are not kept.
    """
    least = weights.kthvalue(len(weights) - m + 1).values
    above = (weights > least).nonzero().flatten()
    ties = (weights == least).nonzero().flatten()[: m - len(above)]
    kept = torch.cat([above, ties])
    return kept[weights[kept].argsort(descending=True, stable=True)]
