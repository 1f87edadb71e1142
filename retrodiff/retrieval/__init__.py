"""Retrievers, proposal distributions and precomputed neighbors."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.retrieval.proposal import NeighborCounts, TopM, Uniform
from retrodiff.retrieval.retriever import (
    Diverse,
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    NearestNeighbors,
    RandomOfTop,
)

__all__ = [
    "Diverse",
    "ExcludeDuplicates",
    "ExcludeGroup",
    "ExcludeSelf",
    "NearestNeighbors",
    "NeighborCounts",
    "RandomOfTop",
    "TopM",
    "Uniform",
    "neighbor_table",
]
