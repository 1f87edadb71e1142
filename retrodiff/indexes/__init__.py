"""Search for nearest rows: exact by default, approximate indexes for many rows."""

from retrodiff.indexes.annoy import Annoy
from retrodiff.indexes.choice import TARGET, automatic, build_automatic, suitable
from retrodiff.indexes.cuvs import CuVS
from retrodiff.indexes.exact import Exact
from retrodiff.indexes.faiss import Faiss
from retrodiff.indexes.recipe import (
    Recall,
    Recipe,
    recall_of,
    recipe_from_string,
)
from retrodiff.indexes.saved import load_index, save_index, saved_index
from retrodiff.indexes.scann import ScaNN
from retrodiff.indexes.usearch import USearch
from retrodiff.indexes.vectors import Vectors

__all__ = [
    "TARGET",
    "Annoy",
    "CuVS",
    "Exact",
    "Faiss",
    "Recall",
    "Recipe",
    "ScaNN",
    "USearch",
    "Vectors",
    "automatic",
    "build_automatic",
    "load_index",
    "recall_of",
    "recipe_from_string",
    "save_index",
    "saved_index",
    "suitable",
]
