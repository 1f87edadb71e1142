"""How do we find neighbors fast? Exact search by default, approximate indexes for many rows."""

from retrodiff.indexes.annoy import Annoy
from retrodiff.indexes.exact import Exact
from retrodiff.indexes.faiss import Faiss
from retrodiff.indexes.recipe import (
    Recall,
    Recipe,
    automatic,
    load_index,
    recall_of,
    recipe_from_string,
    save_index,
    saved_index,
)
from retrodiff.indexes.usearch import USearch
from retrodiff.indexes.vectors import Vectors

__all__ = [
    "Annoy",
    "Exact",
    "Faiss",
    "Recall",
    "Recipe",
    "USearch",
    "Vectors",
    "automatic",
    "load_index",
    "recall_of",
    "recipe_from_string",
    "save_index",
    "saved_index",
]
