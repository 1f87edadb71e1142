"""Approximate neighbors by a navigable graph: fast on a CPU, slower to build.

USearch (Unum): HNSW graphs (Malkov & Yashunin 2016) with half-precision storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.indexes.axes import rerank
from retrodiff.indexes.interruptible import heard
from retrodiff.indexes.vectors import (
    Vectors,
    check_loaded,
    check_numbers,
    check_search,
    unit64,
    unit_rows,
)
from retrodiff.interfaces import Index
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar

AT_ONCE = 4096
"""Queries of one call: enough for any number of threads, few enough to be interrupted between."""


@dataclass(frozen=True)
class USearch:
    """Recipe of a USearch index.

    Args:
        connectivity: edges per node of the graph.
        expansion_add: candidates looked at while building.
        expansion_search: candidates looked at in a search.
        rerank: candidates ranked again by exact cosine.

    Examples:
        >>> from retrodiff.indexes import USearch
        >>> USearch(expansion_search=256)
        USearch(connectivity=16, expansion_add=128, expansion_search=256, rerank=64)
    """

    connectivity: int = 16
    expansion_add: int = 128
    expansion_search: int = 128
    rerank: int = 64
    name = "usearch"

    def __post_init__(self) -> None:
        check_numbers(self)

    @full_precision()
    def build(self, vectors: Vectors, progress: bool = False) -> USearchIndex:
        """Inserts every row into the graph."""
        graph = self._empty(vectors.dim)
        with progress_bar(len(vectors), "usearch", progress, unit="rows") as bar:
            for start, rows, norms in vectors.blocks(8192):
                keys = np.arange(start, start + len(rows), dtype=np.uint64)
                heard(graph.add, keys, unit_rows(rows, norms).numpy())
                bar.update(len(rows))
        return USearchIndex(self, vectors, graph)

    def load(self, folder: Path, vectors: Vectors) -> USearchIndex:
        """Loads the index written by `USearchIndex.save`, memory-mapped."""
        graph = self._empty(vectors.dim)
        graph.view(str(folder / "graph.usearch"))
        check_loaded(folder, len(graph), graph.ndim, vectors)
        return USearchIndex(self, vectors, graph)

    def _empty(self, dim: int) -> Any:
        try:
            from usearch.index import Index as Graph
        except ImportError as error:
            raise ValueError(
                "usearch is not installed: pip install 'retrodiff[indexes]', or use "
                "the index Exact()"
            ) from error
        return Graph(
            ndim=dim,
            metric="cos",
            dtype="f16",
            connectivity=self.connectivity,
            expansion_add=self.expansion_add,
            expansion_search=self.expansion_search,
        )


class USearchIndex(Index):
    """A graph, and exact cosine on what it finds."""

    def __init__(self, recipe: USearch, vectors: Vectors, graph: Any):
        self.recipe, self.vectors, self.graph = recipe, vectors, graph

    def save(self, folder: Path) -> None:
        """Writes the graph."""
        self.graph.save(str(folder / "graph.usearch"))

    @full_precision()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        k = check_search(queries, k, len(self.vectors), self.vectors.dim)
        n = min(max(self.recipe.rerank, 2 * k), len(self.vectors))
        points = unit64(queries.cpu()).float().numpy()
        found: list[Tensor] = []
        for start in range(0, len(points), AT_ONCE):
            matches = heard(self.graph.search, points[start : start + AT_ONCE], n)
            keys = torch.from_numpy(matches.keys.astype(np.int64))
            if keys.ndim == 1:  # a single query is answered without an axis for queries
                found.append(keys)
                continue
            # Rows with fewer matches than n are filled up with zeros.
            found += [row[:count] for row, count in zip(keys, matches.counts.tolist(), strict=True)]
        return rerank(self.vectors, queries, found, k)
