"""Approximate neighbors by random-projection trees, for large databases on a CPU.

Annoy (Bernhardsson, Spotify) searches the principal components of the unit vectors; what it finds
is ranked again by exact cosine. Trees on the full width are too weak at the widths of CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.disk.tensors import map_tensors, write_tensors
from retrodiff.indexes.axes import principal_axes, rerank
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

_works: bool | None = None


@dataclass(frozen=True)
class Annoy:
    """Recipe of an Annoy index.

    Args:
        trees: more trees find more, and take more memory.
        components: principal components that the trees see (at most the embedding's width).
        rerank: candidates ranked again by exact cosine.
        search: nodes visited, at least; None: trees * rerank.
        seed: of the random splits.

    Examples:
        >>> import torch
        >>> from retrodiff.indexes import Annoy, Vectors, recall_of
        >>> vectors = Vectors([torch.randn(500, 32)])
        >>> index = Annoy(trees=20, components=16).build(vectors)
        >>> recall_of(index, vectors, k=10).value > 0.9
        True
    """

    trees: int = 50
    components: int = 64
    rerank: int = 400
    search: int | None = None
    seed: int = 0
    name = "annoy"

    def __post_init__(self) -> None:
        check_numbers(self)

    @full_precision()
    def build(self, vectors: Vectors, progress: bool = False) -> AnnoyIndex:
        """Projects every row, and grows the trees."""
        check_annoy()
        axes = principal_axes(vectors, self.components, progress=progress)
        trees = _empty(axes.shape[1])
        trees.set_seed(self.seed)
        with progress_bar(len(vectors), "annoy", progress, unit="rows") as bar:
            for start, rows, norms in vectors.blocks(8192):
                for i, row in enumerate((unit_rows(rows, norms) @ axes).tolist(), start):
                    trees.add_item(i, row)
                bar.update(len(rows))
        heard(trees.build, self.trees, n_jobs=1)
        return AnnoyIndex(self, vectors, axes, trees)

    def load(self, folder: Path, vectors: Vectors) -> AnnoyIndex:
        """Loads the index written by `AnnoyIndex.save`; its trees stay on disk until touched.

        Raises:
            ValueError: the folder holds no axes of the projection.
        """
        check_annoy()
        file = folder / "axes.safetensors"
        axes = map_tensors(file, again="build the index again").get("axes")
        if axes is None or axes.ndim != 2 or axes.dtype != torch.float32:
            raise ValueError(f"{file} holds no axes: build the index again")
        trees = _empty(axes.shape[1])
        trees.load(str(folder / "trees.ann"))
        check_loaded(folder, trees.get_n_items(), axes.shape[0], vectors)
        return AnnoyIndex(self, vectors, axes, trees)


class AnnoyIndex(Index):
    """Trees over principal components, and exact cosine on what they find."""

    def __init__(self, recipe: Annoy, vectors: Vectors, axes: Tensor, trees: Any):
        self.recipe, self.vectors, self.axes, self.trees = recipe, vectors, axes, trees

    def save(self, folder: Path) -> None:
        """Writes axes and trees."""
        write_tensors(folder / "axes.safetensors", {"axes": self.axes})
        self.trees.save(str(folder / "trees.ann"))

    @full_precision()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        k = check_search(queries, k, len(self.vectors), self.vectors.dim)
        n = min(max(self.recipe.rerank, 2 * k), len(self.vectors))
        visit = self.recipe.search or self.recipe.trees * n
        points = unit64(queries.cpu()).float() @ self.axes
        found = [
            torch.from_numpy(
                np.array(self.trees.get_nns_by_vector(point, n, search_k=visit), np.int64)
            )
            for point in points.tolist()
        ]
        return rerank(self.vectors, queries, found, k)


def check_annoy() -> None:
    """Refuses builds of annoy that find too few neighbors; looked at once per process."""
    global _works
    if _works is None:
        _works = _finds_neighbors()
    if not _works:
        raise ValueError(
            "this build of annoy does not return the k nearest of a small test set (a known fault "
            "of some platforms' builds): use the index Exact() instead"
        )


def _finds_neighbors(rows: int = 300, dim: int = 8, k: int = 10) -> bool:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(rows, dim, generator=g, dtype=torch.float32, device="cpu")
    points = points / points.norm(dim=1, keepdim=True)
    trees = _empty(dim)
    trees.set_seed(0)
    for i, point in enumerate(points.tolist()):
        trees.add_item(i, point)
    trees.build(20, n_jobs=1)
    hits = 0
    for query in points[:10]:
        found = trees.get_nns_by_vector(query.tolist(), k, search_k=20 * rows)
        if len(set(found)) != k:
            return False
        hits += len(set(found) & set((points @ query).topk(k).indices.tolist()))
    return hits >= 0.9 * 10 * k


def _empty(dim: int) -> Any:
    try:
        from annoy import AnnoyIndex as Trees
    except ImportError as error:
        raise ValueError(
            "annoy is not installed: pip install annoy, or use the index Exact()"
        ) from error
    return Trees(dim, "euclidean")
