"""Retrievers for several queries per image: search for each one, then merge the results.

The several embeddings of an image are a `Query` of (b, q, d), from prompts of your own, or made
from one prompt by `MultiQuery`; `ReciprocalRankFusion` and `MaxSimilarity` merge what they find.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Neighbors, Query, Retriever, TextEncoder
from retrodiff.numbers import real, whole


@dataclass(frozen=True)
class ReciprocalRankFusion(Retriever):
    """The rows that stand high in many lists: a row's score is the sum of 1 / (constant + rank).

    Cormack, Clarke & Büttcher 2009. Only ranks count, so no query outweighs another by the scale of
    its similarities. The ``similarity`` of a row is its cosine to the nearest of the queries. A
    query of (b, d) has nothing to merge and gets the retriever's own rows.

    Args:
        retriever: what ranks the rows for each of the q queries of an image.
        top: how many rows of each list take part; k, if that is more.
        constant: 60 in the paper; the smaller, the more the first ranks count.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import NearestNeighbors, ReciprocalRankFusion
        >>> from retrodiff.testing import small_database
        >>> two_each = Query(torch.randn(3, 2, 8))  # three images, two queries for each
        >>> retriever = ReciprocalRankFusion(NearestNeighbors(), top=10)
        >>> retriever.retrieve(two_each, small_database(), k=4).indices.shape
        torch.Size([3, 4])
    """

    retriever: Retriever
    top: int
    constant: float = 60.0

    def __post_init__(self) -> None:
        whole("top", self.top)
        real("constant", self.constant, 0)

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Queries (b, q, d) -> k rows (b, k), highest score first."""
        if query.embedding.ndim == 2:
            return self.retriever.retrieve(query, database, k)
        found = _lists(self.retriever, query, database, self.top, k)
        rank = torch.arange(1, found.k + 1, device=found.indices.device)
        score = (1 / (self.constant + rank)).double().expand(found.indices.shape)
        return _merged(found, score, k)


@dataclass(frozen=True)
class MaxSimilarity(Retriever):
    """The rows nearest to any of the queries (CombMAX: Fox & Shaw 1994).

    A query of (b, d) has nothing to merge and gets the retriever's own rows.

    Args:
        retriever: what ranks the rows for each of the q queries of an image.
        top: how many rows of each list take part; k, if that is more.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.retrieval import MaxSimilarity, NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> two_each = Query(torch.randn(3, 2, 8))  # three images, two queries for each
        >>> retriever = MaxSimilarity(NearestNeighbors(), top=10)
        >>> retriever.retrieve(two_each, small_database(), k=4).indices.shape
        torch.Size([3, 4])
    """

    retriever: Retriever
    top: int

    def __post_init__(self) -> None:
        whole("top", self.top)

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Queries (b, q, d) -> k rows (b, k), highest cosine to any of the q first."""
        if query.embedding.ndim == 2:
            return self.retriever.retrieve(query, database, k)
        return _merged(_lists(self.retriever, query, database, self.top, k), None, k)


class MultiQuery(Retriever):
    """Asks for each prompt in several phrasings, the prompt itself among them.

    What conditions the network as text stays the prompt as it was given; only the search is wider.
    Queries that are no text (images, rows drawn from a proposal) are looked up as they are, and
    never rephrased.

    A saved model does not keep it, because it holds the encoder: hand it in again when you load.

    Args:
        retriever: what merges the phrasings, such as `ReciprocalRankFusion`.
        encoder: the model's own; must place text.
        phrasings: templates such as ``"a painting of {}"``, or a function from a prompt to other
            texts, as many for each prompt.

    Raises:
        ValueError: phrasings are no list of templates with ``{}``; or, when asked, their numbers
            differ from prompt to prompt.

    Examples:
        >>> from retrodiff import Query
        >>> from retrodiff.encoders import ClassNames
        >>> from retrodiff.retrieval import MultiQuery, NearestNeighbors, ReciprocalRankFusion
        >>> encoder = ClassNames(("a door", "a red door"))
        >>> merging = ReciprocalRankFusion(NearestNeighbors(), top=10)
        >>> retriever = MultiQuery(merging, encoder, lambda prompt: ["a red door"])
        >>> query = Query(encoder.encode_text(["a door"]), source=("a door",))
        >>> retriever.expand(query).embedding.tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """

    def __init__(
        self,
        retriever: Retriever,
        encoder: TextEncoder,
        phrasings: Sequence[str] | Callable[[str], Sequence[str]],
    ) -> None:
        if not callable(phrasings):
            if isinstance(phrasings, str) or not all("{}" in text for text in phrasings):
                raise ValueError(
                    f"phrasings={phrasings!r}, but a list of templates is taken, each with {{}} "
                    "where the prompt goes"
                )
            phrasings = tuple(phrasings)
        self.retriever, self.encoder, self.phrasings = retriever, encoder, phrasings

    def __repr__(self) -> str:
        return f"MultiQuery({self.retriever!r}, phrasings={self.phrasings!r})"

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows (b, k) for all phrasings of each prompt."""
        several = self.expand(query)
        return self.retriever.retrieve(several, database, k)

    def expand(self, query: Query) -> Query:
        """Queries (b, d) -> the same with all their phrasings (b, q, d)."""
        if query.embedding.ndim != 2 or not query.source or len(query.source) != len(query):
            return query
        sources = list(dict.fromkeys(query.source))
        encoded = self._encoded(sources, query)
        own = encoded[[sources.index(source) for source in query.source]]
        # Whether a source is a prompt is not for its wording to tell: its embedding does.
        is_text = torch.cosine_similarity(own, query.embedding, dim=-1) > 0.999
        rows = is_text.nonzero().flatten().tolist()
        prompts = list(dict.fromkeys(query.source[row] for row in rows))
        if not prompts:
            return query
        others = [tuple(self._others(prompt)) for prompt in prompts]
        counts = {len(some) for some in others}
        if len(counts) > 1:
            raise ValueError(
                f"phrasings gave {min(counts)} texts for one prompt and {max(counts)} for "
                "another: give as many for each"
            )
        # A query that is no text is asked as often as the prompts, always as it is.
        several = query.embedding.unsqueeze(1).repeat(1, 1 + len(others[0]), 1)
        if others[0]:
            flat = self._encoded([text for some in others for text in some], query)
            wide = flat.view(len(prompts), len(others[0]), -1)
            several[rows, 1:] = wide[[prompts.index(query.source[row]) for row in rows]]
        return dataclasses.replace(query, embedding=several)

    def _encoded(self, texts: Sequence[str], query: Query) -> Tensor:
        """Texts -> embeddings (n, d), like those of the query."""
        with torch.no_grad():
            return self.encoder.encode_text(texts).to(query.embedding)

    def _others(self, prompt: str) -> Sequence[str]:
        if callable(self.phrasings):
            return self.phrasings(prompt)
        return [template.replace("{}", prompt) for template in self.phrasings]


def _lists(retriever: Retriever, query: Query, database: Database, top: int, k: int) -> Neighbors:
    """The top rows (b, q, l) of each query."""
    if query.embedding.ndim != 3:
        raise ValueError(
            f"queries of shape {tuple(query.embedding.shape)} cannot be merged: expected "
            "(b, q, d), q queries for each image"
        )
    reach = max(k, min(top, len(database)))
    try:
        return retriever.retrieve(query, database, reach)
    except ValueError as error:
        if reach == k:
            raise
        retriever.retrieve(query, database, k)  # raises its own error, where it isn't about top
        raise ValueError(
            f"top={top}: {reach} rows of each list take part in the merge, more than the retriever "
            f"has ({error}): lower top, to k={k} or more"
        ) from error


def _merged(found: Neighbors, score: Tensor | None, k: int) -> Neighbors:
    """Lists (b, q, l) -> the k rows of highest total score (b, k), each once.

    Args:
        found: the lists.
        score: (b, q, l), added up over the lists; None: the highest similarity.
        k: rows to keep; ties go to the higher similarity, then to the earlier query.
    """
    every = Neighbors(
        found.indices.flatten(1), found.similarity.flatten(1), found.embeddings.flatten(1, 2)
    )
    nearest_first = every.similarity.argsort(dim=-1, descending=True, stable=True)
    # Stable, so the first of equal rows is the most similar one, and keeps its similarity.
    rows, order = every.indices.gather(1, nearest_first).sort(dim=-1, stable=True)
    column = nearest_first.gather(1, order)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    if score is None:
        total = every.similarity.gather(1, column)
    else:
        group = first.cumsum(-1) - 1
        each = score.flatten(1).gather(1, column)
        total = torch.zeros_like(each).scatter_add_(1, group, each).gather(1, group)
    total = total.masked_fill(~first, -torch.inf)
    by_similarity = torch.full_like(total, -torch.inf).scatter_(1, order, total)
    best = by_similarity.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return every.take(nearest_first.gather(1, best))
