"""Principal axes of rows, and exact ranking of candidates, for approximate indexes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrodiff.indexes.candidates import shortfall
from retrodiff.indexes.vectors import Vectors, unit64, unit_rows
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar


@full_precision()
def principal_axes(vectors: Vectors, components: int, progress: bool = False) -> Tensor:
    """The axes (d, components) that keep most of the unit rows' inner products.

    Not centered: it is the cosine that must survive, not the variance.
    """
    d = vectors.dim
    if components >= d:
        return torch.eye(d, dtype=torch.float32, device="cpu")
    moment = torch.zeros(d, d, dtype=torch.float64, device="cpu")
    with progress_bar(len(vectors), "principal axes", progress, unit="rows") as bar:
        for _, rows, norms in vectors.blocks(8192):
            unit = unit_rows(rows, norms)
            moment += unit.T @ unit
            bar.update(len(rows))
    return leading_axes(moment, components)


@full_precision()
def leading_axes(moment: Tensor, components: int) -> Tensor:
    """The axes (d, components) of the largest second moments, largest first, float32."""
    vectors = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors[:, -components:].flip(1).float().contiguous()


def rerank(
    vectors: Vectors, queries: Tensor, found: Sequence[Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """Candidates of each query -> similarity (b, k) and indices (b, k) by exact cosine."""
    unit = unit64(queries.cpu())
    similarity = torch.empty(len(found), k, dtype=torch.float32, device="cpu")
    indices = torch.empty(len(found), k, dtype=torch.int64, device="cpu")
    for i, rows in enumerate(found):
        # Rising order first, so that the stable sort leaves ties to the lowest row.
        rows = rows.unique()
        if len(rows) < k:
            raise ValueError(
                f"the index found {len(rows)} of k={k} neighbors: search with Exact(), or build "
                "the index with a wider search"
            )
        less = shortfall(vectors.rows(rows), unit[i])
        order = less.argsort(stable=True)[:k]
        similarity[i], indices[i] = 1 - less[order], rows[order]
    return similarity.to(queries.device), indices.to(queries.device)
