"""Neighbors from an image's own group only, such as its style: so that style follows the database.

A network that has always seen neighbors of many styles has no reason to take the style from them.
Shown neighbors of the image's own style for a share of the images, it learns that style is what
the database says, and a database of another style changes what it draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.databases.searchable import Subset
from retrodiff.interfaces import Database, Neighbors, Query, Retriever
from retrodiff.retrieval.neighbors import neighbor_table


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of training images, and of the rows of a database.

    Args:
        column: of the database, such as ``style``.
        names: names of the groups that training images are of.
        own: (n,) number of each image's group, -1: of none.
        parts: the rows of each group.
        share: of the images that get neighbors from their own group.
    """

    column: str
    names: tuple[str, ...]
    own: Tensor
    parts: tuple[Subset, ...]
    share: float

    @classmethod
    def of(
        cls, database: Database, column: str, own: Sequence[Any], share: float, k: int
    ) -> Groups:
        """Finds the rows of each group.

        Args:
            database: with the column.
            column: its name.
            own: group of each training image, as the column says it; None: of none.
            share: of the images that get neighbors from their own group.
            k: rows that each group must have at least.

        Raises:
            ValueError: the database has no such column, or a group has too few rows.
        """
        if not hasattr(database, "column") or not hasattr(database, "subset"):
            raise ValueError(
                f"{type(database).__name__} has no columns, so it has no groups by {column!r}: use "
                "a database that records were built into"
            )
        values = np.asarray(database.column(column))  # type: ignore[attr-defined]
        rows: dict[Any, list[int]] = {}
        for row, value in enumerate(values.tolist()):
            rows.setdefault(value, []).append(row)
        wanted = dict.fromkeys(value for value in own if value is not None)
        for value in wanted:
            found = len(rows.get(value, ()))
            if found < k:
                raise ValueError(
                    f"{column}={value!r} has {found} rows in the database, but k={k} neighbors are "
                    f"wanted of it: lower k, add rows, or give None as the {column} of its images"
                )
        numbers = {value: number for number, value in enumerate(wanted)}
        return cls(
            column,
            tuple(map(str, wanted)),
            torch.tensor([numbers.get(value, -1) for value in own], dtype=torch.int64),
            tuple(database.subset(rows[value]) for value in wanted),  # type: ignore[attr-defined]
            share,
        )

    def describe(self) -> dict[str, Any]:
        """What must be the same when a training is continued."""
        found = hashlib.sha256(self.own.numpy().data)
        for name, part in zip(self.names, self.parts, strict=True):
            found.update(f"{name} {part.fingerprint.rows}".encode())
        return {"by": self.column, "share": self.share, "members": found.hexdigest()[:32]}

    def retrieve(self, query: Query, own: Tensor, k: int, retriever: Retriever) -> Tensor:
        """Rows (b, k) or (b, r, k) of each query's own group.

        Args:
            query: b queries, with ids where they are rows of the database.
            own: (b,) their groups.
            k: neighbors of each.
            retriever: which ones.
        """
        found = torch.zeros((*query.embedding.shape[:-1], k), dtype=torch.int64)
        for number in own.unique().tolist():
            here = (own == number).nonzero().flatten()
            part = self.parts[number]
            try:
                chosen: Neighbors = retriever.retrieve(_within(query.rows(here), part), part, k)
            except ValueError as error:
                raise ValueError(f"{self.column}={self.names[number]!r}: {error}") from None
            found[here] = part.rows[chosen.indices.cpu()]
        return found

    def table(
        self,
        query: Query,
        own: Tensor,
        k: int,
        retriever: Retriever,
        file: Callable[[str], Path | None],
        *,
        seed: int,
        progress: bool,
    ) -> Tensor:
        """Rows (b, k) or (b, r, k) of each query's own group, found once; -1 for queries of none.

        Args:
            query: b queries, with ids where they are rows of the database.
            own: (b,) their groups.
            k: neighbors of each.
            retriever: which ones.
            file: the file that keeps the rows of a group's queries, by its name; None: memory.
            seed: of retrievers that draw.
            progress: show bars.
        """
        found = torch.full((*query.embedding.shape[:-1], k), -1, dtype=torch.int64)
        for number, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            here = (own == number).nonzero().flatten()
            if not len(here):
                continue
            try:
                rows = neighbor_table(
                    _within(query.rows(here), part),
                    part,
                    k,
                    retriever,
                    path=file(name),
                    resume=True,
                    seed=seed,
                    progress=progress,
                )
            except ValueError as error:
                raise ValueError(f"{self.column}={name!r}: {error}") from None
            found[here] = part.rows[rows.long()]
        return found


def groups_of(
    database: Database, column: str, ids: Tensor | None, given: Sequence[Any] | None, n: int
) -> list[Any]:
    """The group of each training image: as it is given, or that of the row that it is.

    Raises:
        ValueError: there are not as many as images; or images are no rows, so it is not known.
    """
    if given is not None:
        if isinstance(given, str) or len(given) != n:
            count = "one text" if isinstance(given, str) else len(given)
            raise ValueError(
                f"{n} training images, but groups is {count}: give the {column} of each, or None"
            )
        return [value.item() if isinstance(value, np.generic) else value for value in given]
    if ids is None or not bool((ids >= 0).any()):
        raise ValueError(
            f"the {column} of the training images is not known, since none of them is a row of the "
            f"database: give it, groups=[...], one for each image"
        )
    values = np.asarray(database.column(column)).tolist()  # type: ignore[attr-defined]
    return [values[row] if row >= 0 else None for row in ids.tolist()]


def _within(query: Query, part: Subset) -> Query:
    """Queries whose ids are rows of the whole database -> the same, as rows of a part of it."""
    if query.ids is None:
        return query
    order = part.rows.argsort()
    sorted_rows = part.rows[order]
    ids = query.ids.cpu()
    at = torch.searchsorted(sorted_rows, ids).clamp_max(len(sorted_rows) - 1)
    ids = torch.where(sorted_rows[at] == ids, order[at], -1)
    return replace(query, ids=ids)
