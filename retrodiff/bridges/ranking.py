"""Steps of choosing: lists of captions beside lists of pictures, pictures that differ, variety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrodiff.bridges.reference_database import View
from retrodiff.interfaces import Database, Neighbors, Query, Retriever, unit
from retrodiff.retrieval import Diverse


@dataclass(frozen=True, eq=False)
class PicturesAndCaptions(Retriever):
    """Two lists for each query: rows by their pictures, and rows by their captions.

    To be merged by `ReciprocalRankFusion`, which looks at ranks alone, since a prompt's cosines to
    captions and to pictures are of different scale. Similarities are to the pictures in both lists.
    Where fewer rows have captions than are asked for, the others follow in the order of pictures.

    Args:
        retriever: what ranks the pictures.
        view: rows with captions.
    """

    retriever: Retriever
    view: View

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Queries (b, q, d) -> lists (b, 2q, k)."""
        by_picture = self.retriever.retrieve(query, database, k)
        found = self.view.search_captions(query, k)
        rows = found.indices
        if rows.shape[-1] < k:
            both = torch.cat([rows, by_picture.indices.to(rows.device)], -1).flatten(0, -2)
            each = [list(dict.fromkeys(line))[:k] for line in both.tolist()]
            rows = torch.tensor(each, device=rows.device).view(*rows.shape[:-1], k)
        embeddings = database.embeddings(rows)
        asked = unit(query.embedding.float()).unsqueeze(-2)
        similarity = (unit(embeddings.float()) * asked).sum(-1)
        return Neighbors(
            torch.cat([by_picture.indices, rows], 1),
            torch.cat([by_picture.similarity, similarity], 1),
            torch.cat([by_picture.embeddings, embeddings], 1),
        )


@dataclass(frozen=True, eq=False)
class _Given(Retriever):
    """Hands out rows that are ranked already."""

    ranked: Neighbors

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """The first k of them."""
        del query, database
        return self.ranked.take(torch.arange(k))


def copies_among(ranked: Neighbors, threshold: float) -> Mapping[int, tuple[int, float]]:
    """Places of a list (1, n) that are near copies of an earlier place -> that one, and the cosine.

    Places that are copies themselves have no copies: the first of a group stays.
    """
    rows = unit(ranked.embeddings[0].float())
    between = rows @ rows.T
    found: dict[int, tuple[int, float]] = {}
    for i in range(len(rows)):
        kept = [j for j in range(i) if j not in found]
        if kept and float(between[i, kept].max()) > threshold:
            nearest = kept[int(between[i, kept].argmax())]
            found[i] = (nearest, float(between[i, nearest]))
    return found


def varied(ranked: Neighbors, database: Database, query: Query, diversity: float, k: int) -> Tensor:
    """Places (k,) of a ranked list (1, n), by maximal marginal relevance of `Diverse`.

    The relevance of a place is the similarity of its rank, so that a fused ranking counts. It is
    stretched to the spread of the rows' cosines to each other: cosines of text to pictures lie in
    a narrow band, and would not count beside those of pictures to each other.
    """
    n = ranked.k
    k = min(k, n)
    if diversity == 0 or k == n == 1:
        return torch.arange(k)
    relevance = ranked.similarity.float().sort(-1, descending=True).values
    rows = unit(ranked.embeddings[0].float())
    apart = ~torch.eye(n, dtype=torch.bool, device=rows.device)
    spread, own = (rows @ rows.T)[apart].std(), relevance.std()
    if n > 2 and float(own) > 0 and float(spread) > 0:
        relevance = relevance * (spread / own)
    places = replace(ranked, indices=torch.arange(n).unsqueeze(0), similarity=relevance, records=())
    return Diverse(_Given(places), diversity, top=n).retrieve(query, database, k).indices[0]
