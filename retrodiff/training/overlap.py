"""Training images that are rows of the database themselves: found, and warned of."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from retrodiff.components import inside
from retrodiff.interfaces import Database, Query, Retriever
from retrodiff.retrieval import ExcludeGroup, ExcludeSelf

SAME = 1e-6
"""1 - cosine up to which a database row and an image are the same picture: float16 rounds by less,
two photographs are further apart."""


def own_rows(embeddings: Tensor, database: Database, batch_size: int = 1024) -> Tensor:
    """Rows of the database (n,) that images are themselves, -1 where they are none.

    A row is an image's own if it is nearest to it and has the same embedding, up to rounding.

    Args:
        embeddings: (n, d), made with the database's encoder.
        database: D.
        batch_size: images per search.
    """
    found: list[Tensor] = []
    for part in embeddings.split(batch_size):
        nearest = database.search(Query(part), 1)
        own = nearest.indices[:, 0].cpu()
        found.append(torch.where(_same(part, nearest.embeddings[:, 0]), own, -1))
    return torch.cat(found)


def _same(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double().cpu(), other.double().cpu()
    return 1 - torch.cosine_similarity(one, other, dim=-1) <= SAME


def needs_ids(retriever: Retriever) -> bool:
    """Whether a retriever leaves out rows that the queries are themselves."""
    return any(isinstance(part, (ExcludeSelf, ExcludeGroup)) for part in inside(retriever))


def warn_of_copies(embeddings: Tensor, nearest: Tensor, stacklevel: int) -> None:
    """Warns once where images are the nearest neighbors of themselves.

    Args:
        embeddings: (n, d) of some images.
        nearest: (n, d) of the nearest neighbor of each.
        stacklevel: of the warning.
    """
    same = int(_same(embeddings, nearest).sum())
    if same:
        warnings.warn(
            f"{same} of {len(embeddings)} training images are rows of the database themselves, "
            "each its own nearest neighbor, so the network learns to copy: leave them out, wrap "
            "the retriever in ExcludeSelf (--exclude-self), where the database holds copies of "
            "them in ExcludeDuplicates, or use a database of other images",
            stacklevel=stacklevel + 1,
        )
