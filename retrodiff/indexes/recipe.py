"""Builds and measures indexes, whatever their kind.

A recipe holds hyper-parameters; ``build`` makes an index from vectors, and ``load`` opens one that
was saved (see `retrodiff.indexes.saved`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from retrodiff.indexes.annoy import Annoy
from retrodiff.indexes.cuvs import CuVS
from retrodiff.indexes.exact import Exact
from retrodiff.indexes.faiss import Faiss
from retrodiff.indexes.scann import ScaNN
from retrodiff.indexes.usearch import USearch
from retrodiff.indexes.vectors import Vectors
from retrodiff.interfaces import Index

EXACT_ROWS = 2_000_000
"""Up to here exact search is the automatic choice on a CPU: one query over so many rows of width
512 takes less than 0.1 s on two cores (benchmarks/results/exact_search.json)."""
RECIPES: dict[str, type[Any]] = {r.name: r for r in (Exact, Annoy, USearch, Faiss, ScaNN, CuVS)}


class SavableIndex(Index, Protocol):
    """An index that can be written into a folder."""

    def save(self, folder: Path) -> None:
        """Writes what `Recipe.load` needs."""
        ...


class Recipe(Protocol):
    """Hyper-parameters of an index: a frozen dataclass of JSON-able values.

    Examples:
        >>> from retrodiff.indexes import Annoy, recipe_from_string
        >>> recipe = recipe_from_string("annoy:trees=20,rerank=200")
        >>> recipe == Annoy(trees=20, rerank=200), recipe.name
        (True, 'annoy')
    """

    @property
    def name(self) -> str:
        """What it is called on a command line and on disk."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, vectors: Vectors, progress: bool = False) -> SavableIndex:
        """The index over these vectors."""
        ...

    def load(self, folder: Path, vectors: Vectors) -> SavableIndex:
        """The index that was saved in the folder."""
        ...


@dataclass(frozen=True)
class Recall:
    """Share of the true k nearest that an index finds, on the user's own vectors.

    Args:
        value: in [0, 1].
        k: neighbors asked for.
        queries: rows that were asked for their neighbors (each one's own row is left out).

    Examples:
        >>> import torch
        >>> from retrodiff.indexes import Exact, Vectors, recall_of
        >>> vectors = Vectors([torch.randn(500, 32)])
        >>> print(recall_of(Exact().build(vectors), vectors, k=10))
        recall@10 1.000 on 256 rows
    """

    value: float
    k: int
    queries: int

    def __str__(self) -> str:
        return f"recall@{self.k} {self.value:.3f} on {self.queries} rows"


def recall_of(
    index: Index, vectors: Vectors, k: int = 20, queries: int = 256, seed: int = 0
) -> Recall:
    """Asks an index and the exact search for the neighbors of some of the rows themselves.

    Args:
        index: is asked.
        vectors: the rows (m, d) that it was built of.
        k: neighbors of each; fewer where there are fewer other rows.
        queries: rows that are asked with; their own row is left out.
        seed: which rows.
    """
    m = len(vectors)
    k = min(k, m - 1)
    if k < 1:
        return Recall(1.0, 0, 0)
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:queries]
    asked = vectors.rows(rows)
    truth = Exact().build(vectors).search(asked, k + 1)[1]
    found = index.search(asked, k + 1)[1]
    hits = total = 0
    for row, true, got in zip(rows.tolist(), truth.tolist(), found.tolist(), strict=True):
        wanted = set([r for r in true if r != row][:k])
        hits += len(wanted & set(got))
        total += len(wanted)
    return Recall(hits / total, k, len(rows))


def recipe_from_string(text: str) -> Recipe:
    """The recipe that a command line names: ``annoy``, ``annoy:trees=20,rerank=200``.

    Raises:
        ValueError: there is no index or option of that name.
    """
    name, _, options = text.partition(":")
    if name not in RECIPES:
        raise ValueError(f"unknown index {name!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    known = {f.name: f for f in fields(recipe)}
    values: dict[str, Any] = {}
    last = ""
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals and isinstance(values.get(last), str):
            values[last] += f",{option}"  # a faiss factory has commas of its own
            continue
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; it has: {', '.join(known)}")
        values[key] = value if "str" in str(known[key].type) else _whole(name, key, value)
        last = key
    return recipe(**values)


def _whole(recipe: str, option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{recipe} takes a whole number as {option}, not {text!r}: such as {recipe}:{option}=20"
        ) from None
