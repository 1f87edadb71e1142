"""Approximate neighbors by a graph that is built and searched on a GPU.

cuVS (NVIDIA): CAGRA graphs (Ootomo et al. 2023). What it finds is ranked again by exact cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.indexes.axes import rerank
from retrodiff.indexes.vectors import Vectors, check_numbers, check_search, unit64, unit_rows
from retrodiff.interfaces import Index
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar


@dataclass(frozen=True)
class CuVS:
    """Recipe of a CAGRA graph.

    Args:
        degree: edges per node of the graph.
        first_degree: edges per node before the graph is pruned.
        visit: candidates kept during a search (cuVS's ``itopk_size``), at least ``rerank``.
        rerank: candidates ranked again by exact cosine.

    Examples:
        >>> from retrodiff.indexes import CuVS
        >>> CuVS(visit=256).name
        'cuvs'
    """

    degree: int = 64
    first_degree: int = 128
    visit: int = 128
    rerank: int = 64
    name = "cuvs"

    def __post_init__(self) -> None:
        check_numbers(self)

    @full_precision()
    def build(self, vectors: Vectors, progress: bool = False) -> CuVSIndex:
        """The graph over every row; rows (float16) and graph must fit on the GPU."""
        cagra = _import_cagra()
        # Of unit vectors the nearest by Euclidean distance are those of the highest cosine.
        rows = torch.empty(len(vectors), vectors.dim, dtype=torch.float16, device="cuda")
        with progress_bar(len(vectors), "cuvs", progress, unit="rows") as bar:
            for start, block, norms in vectors.blocks(65_536):
                rows[start : start + len(block)] = unit_rows(block, norms).half()
                bar.update(len(block))
        parameters = cagra.IndexParams(
            metric="sqeuclidean",
            graph_degree=self.degree,
            intermediate_graph_degree=self.first_degree,
        )
        return CuVSIndex(self, vectors, cagra.build(parameters, rows), rows)

    def load(self, folder: Path, vectors: Vectors) -> CuVSIndex:
        """Loads the index written by `CuVSIndex.save`."""
        graph = _import_cagra().load(str(folder / "graph.cagra"))
        return CuVSIndex(self, vectors, graph)


class CuVSIndex(Index):
    """A CAGRA graph, and exact cosine on what it finds."""

    def __init__(self, recipe: CuVS, vectors: Vectors, graph: Any, rows: Tensor | None = None):
        self.recipe, self.vectors, self.graph = recipe, vectors, graph
        self._rows = rows  # a graph that was just built looks into them

    def save(self, folder: Path) -> None:
        """Writes graph and rows."""
        _import_cagra().save(str(folder / "graph.cagra"), self.graph, include_dataset=True)

    @full_precision()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        k = check_search(queries, k, len(self.vectors), self.vectors.dim)
        cagra = _import_cagra()
        n = min(max(self.recipe.rerank, 2 * k), len(self.vectors))
        points = unit64(queries.cuda()).half()
        parameters = cagra.SearchParams(itopk_size=max(self.recipe.visit, n))
        _, ids = cagra.search(parameters, self.graph, points, n)
        rows = torch.from_numpy(ids.copy_to_host().astype(np.int64))
        found = [row[(row >= 0) & (row < len(self.vectors))] for row in rows]
        return rerank(self.vectors, queries, found, k)


def _import_cagra() -> Any:
    try:
        from cuvs.neighbors import cagra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "cuvs is not installed: pip install 'retrodiff[cuvs]' (cuvs-cu13 for CUDA 13), or use "
            "the index Exact()"
        ) from error
    if not torch.cuda.is_available():
        raise ValueError("cuvs needs a GPU and torch sees none: use the index Exact()")
    return cagra
