"""Any index that faiss's factory makes from a text such as ``HNSW32`` or ``IVF4096,SQ8``.

faiss: Johnson, Douze & Jégou 2017; its "index factory" reads the description.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.indexes.axes import rerank
from retrodiff.indexes.interruptible import heard
from retrodiff.indexes.vectors import (
    Vectors,
    check_loaded,
    check_numbers,
    check_search,
    row_norms,
    unit64,
    unit_rows,
)
from retrodiff.interfaces import Index
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar


@dataclass(frozen=True)
class Faiss:
    """Recipe of a faiss index.

    Args:
        factory: description for faiss's index factory.
        rerank: candidates ranked again by exact cosine.
        train_rows: rows that quantizers and clusters are fitted on, evenly spaced.

    Examples:
        >>> from retrodiff.indexes import Faiss
        >>> Faiss("IVF4096,SQ8", rerank=200)
        Faiss(factory='IVF4096,SQ8', rerank=200, train_rows=200000)
    """

    factory: str = "HNSW32"
    rerank: int = 64
    train_rows: int = 200_000
    name = "faiss"

    def __post_init__(self) -> None:
        check_numbers(self)

    @full_precision()
    def build(self, vectors: Vectors, progress: bool = False) -> FaissIndex:
        """Fits what must be fitted and adds every row.

        Raises:
            ValueError: faiss cannot read the factory, or cannot fit it on so few rows.
        """
        faiss = _import_faiss()
        try:
            index = faiss.index_factory(vectors.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"faiss cannot read the factory {self.factory!r}: try 'HNSW32'"
            ) from error
        if not index.is_trained:
            n = min(self.train_rows, len(vectors))
            # In float64: float32 has no whole numbers beyond 2^24.
            chosen = torch.linspace(0, len(vectors) - 1, n, dtype=torch.float64, device="cpu")
            sample = vectors.rows(chosen.long())
            try:
                heard(index.train, unit_rows(sample, row_norms(sample)).numpy())
            except RuntimeError as error:
                reason = str(error).rpartition("failed: ")[2]
                raise ValueError(
                    f"faiss cannot fit {self.factory!r} on {n:,} rows ({reason:.200}): use a "
                    "factory with fewer clusters, such as 'HNSW32'"
                ) from error
        with progress_bar(len(vectors), "faiss", progress, unit="rows") as bar:
            for _, rows, norms in vectors.blocks(8192):
                heard(index.add, unit_rows(rows, norms).numpy())
                bar.update(len(rows))
        return FaissIndex(self, vectors, index)

    def load(self, folder: Path, vectors: Vectors) -> FaissIndex:
        """Loads the index written by `FaissIndex.save`."""
        index = _import_faiss().read_index(str(folder / "index.faiss"))
        check_loaded(folder, index.ntotal, index.d, vectors)
        return FaissIndex(self, vectors, index)


class FaissIndex(Index):
    """A faiss index, and exact cosine on what it finds."""

    def __init__(self, recipe: Faiss, vectors: Vectors, index: Any):
        self.recipe, self.vectors, self.index = recipe, vectors, index

    def save(self, folder: Path) -> None:
        """Writes faiss's own file."""
        _import_faiss().write_index(self.index, str(folder / "index.faiss"))

    @full_precision()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        k = check_search(queries, k, len(self.vectors), self.vectors.dim)
        n = min(max(self.recipe.rerank, 2 * k), len(self.vectors))
        _, ids = self.index.search(unit64(queries.cpu()).float().numpy(), n)
        found = [row[row >= 0] for row in torch.from_numpy(ids)]
        return rerank(self.vectors, queries, found, k)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "faiss is not installed: pip install 'retrodiff[indexes]', or use the index Exact()"
        ) from error
    return faiss
