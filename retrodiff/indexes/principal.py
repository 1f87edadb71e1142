"""What approximate indexes share: principal axes of the rows, and exact cosine on candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrodiff.indexes.vectors import Vectors
from retrodiff.progress import progress_bar


def unit_rows(rows: Tensor, norms: Tensor) -> Tensor:
    """Stored rows (n, d) divided by their norms (n,), float32; zero stays zero."""
    return rows.float() / norms.clamp_min(1e-12).unsqueeze(1)


def principal_axes(vectors: Vectors, components: int, progress: bool = False) -> Tensor:
    """The axes (d, components) that keep most of the unit rows' inner products.

    Not centered: it is the cosine that must survive, not the variance.
    """
    d = vectors.dim
    if components >= d:
        return torch.eye(d)
    moment = torch.zeros(d, d, dtype=torch.float64)
    with progress_bar(len(vectors), "principal axes", progress, unit="rows") as bar:
        for _, rows, norms in vectors.blocks(8192):
            unit = unit_rows(rows, norms)
            moment += unit.T @ unit
            bar.update(len(rows))
    return leading_axes(moment, components)


def leading_axes(moment: Tensor, components: int) -> Tensor:
    """The axes (d, components) of the largest second moments, largest first, float32."""
    vectors = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors[:, -components:].flip(1).float().contiguous()


def rank_again(
    vectors: Vectors, queries: Tensor, found: Sequence[Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """Candidates of each query -> similarity (b, k) and indices (b, k) by exact cosine."""
    unit = queries.detach().cpu().double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    similarity = torch.empty(len(found), k)
    indices = torch.empty(len(found), k, dtype=torch.int64)
    for i, rows in enumerate(found):
        # Rising order first, so that the stable sort leaves ties to the lowest row.
        rows = rows.unique()
        if len(rows) < k:
            raise ValueError(
                f"the index found {len(rows)} of k={k} neighbors: search with Exact(), or build "
                "the index with a wider search"
            )
        values = vectors.rows(rows).double()
        cosine = ((values * unit[i]).sum(1) / values.norm(dim=1).clamp_min(1e-12)).float()
        order = cosine.argsort(descending=True, stable=True)[:k]
        similarity[i], indices[i] = cosine[order], rows[order]
    return similarity.to(queries.device), indices.to(queries.device)
