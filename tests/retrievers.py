"""One of each retriever that ships, and some of each around a random one."""

from __future__ import annotations

from parts import HashingEncoder

from retrodiff.interfaces import Retriever
from retrodiff.retrieval import (
    Diverse,
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    MaxSimilarity,
    MultiQuery,
    NearestNeighbors,
    RandomOfTop,
    ReciprocalRankFusion,
)

ENCODER = HashingEncoder()
NEAREST = NearestNeighbors()
RANDOM = RandomOfTop(NEAREST, 12)

MERGING: list[Retriever] = [ReciprocalRankFusion(NEAREST, 8), MaxSimilarity(NEAREST, 8)]
"""They take several queries for an image as they come."""

PHRASING: list[Retriever] = [
    MultiQuery(ReciprocalRankFusion(RANDOM, 5), ENCODER, ["the {}", "no {}"]),
    MultiQuery(MaxSimilarity(NEAREST, 5), ENCODER, ["the {}", "no {}"]),
]
"""They ask in several phrasings, which takes an encoder of text."""

RETRIEVERS: list[Retriever] = [
    NEAREST,
    RANDOM,
    Diverse(NEAREST, 0.5, 10),
    Diverse(RANDOM, 0.5, 8),
    ExcludeSelf(NEAREST),
    ExcludeSelf(RANDOM),
    ExcludeGroup(NEAREST, "label"),
    ExcludeDuplicates(NEAREST, 0.6),
    ExcludeDuplicates(RandomOfTop(NEAREST, 32), 0.6),
]
"""They take one query for an image."""
