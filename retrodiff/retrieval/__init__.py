"""Retrievers, proposal distributions and precomputed neighbors."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from retrodiff.retrieval.fusion import MaxSimilarity, MultiQuery, ReciprocalRankFusion
from retrodiff.retrieval.interpolation import interpolated
from retrodiff.retrieval.neighbors import neighbor_table, open_neighbor_table
from retrodiff.retrieval.pinned import Pinned
from retrodiff.retrieval.proposal import Instances, NeighborCounts, TopM, Uniform
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
    "Instances",
    "MaxSimilarity",
    "MultiQuery",
    "NearestNeighbors",
    "NeighborCounts",
    "Pinned",
    "RandomOfTop",
    "ReciprocalRankFusion",
    "TopM",
    "Uniform",
    "interpolated",
    "neighbor_table",
    "open_neighbor_table",
]
