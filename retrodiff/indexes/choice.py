"""Chooses the index of a database: the first of a list whose measured recall reaches a target.

Exact search on a GPU, or up to two million rows; above that on a CPU a graph where one is
installed, else trees over principal components. An index with recall below the target is not
chosen; the function that builds it decides what it leaves on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol, TypeVar

import torch

from retrodiff.indexes.annoy import Annoy
from retrodiff.indexes.exact import Exact
from retrodiff.indexes.recipe import EXACT_ROWS, Recall, Recipe
from retrodiff.indexes.usearch import USearch

TARGET = 0.95
"""Recall that an index must be measured at to be chosen automatically."""


class Measured(Protocol):
    """A built index, with the recall that was measured on it (None: it is exact)."""

    @property
    def recall(self) -> Recall | None:
        """Against the exact search, on the user's own vectors."""
        ...


Built = TypeVar("Built", bound=Measured)


def automatic(rows: int, gpu: bool | None = None) -> Recipe:
    """The recipe for a number of rows: the first of `suitable`.

    Args:
        rows: of the database.
        gpu: whether there is a GPU; None: look.
    """
    return suitable(rows, gpu)[0]


def suitable(rows: int, gpu: bool | None = None) -> list[Recipe]:
    """The recipes to be tried for a number of rows, in order; the last one is exact.

    Args:
        rows: of the database.
        gpu: whether there is a GPU; None: look.
    """
    if rows <= EXACT_ROWS:
        return [Exact()]
    if torch.cuda.is_available() if gpu is None else gpu:
        return [Exact(device="cuda")]
    installed: list[Recipe] = [r for r in (USearch(), Annoy()) if find_spec(r.name) is not None]
    return [*installed, Exact()]


def build_automatic(
    rows: int,
    build: Callable[[Recipe], Built],
    *,
    target: float = TARGET,
    gpu: bool | None = None,
) -> tuple[Built, str]:
    """Builds the first suitable index whose recall reaches the target.

    Args:
        rows: of the database.
        build: makes and measures the index of a recipe. Recall is judged afterwards, so it should
            not save: what it saves stays, also where the index is passed over.
        target: recall that an index must reach.
        gpu: whether there is a GPU; None: look.

    Returns:
        What was built, and in words what was chosen and why.

    Examples:
        ``build_automatic(len(database), partial(database.build_index, save=False))`` gives the
        database, searched by the index that was chosen, and writes nothing.
    """
    missed: list[str] = []
    for recipe in suitable(rows, gpu):
        exact = recipe.name == "exact"
        try:
            built = build(recipe)
        except ValueError as error:
            if exact:
                raise
            missed.append(f"{recipe.name} cannot be built ({error})")
            continue
        if exact or (built.recall is not None and built.recall.value >= target):
            return built, f"{recipe}: {_reason(recipe, built.recall, rows, missed)}"
        missed.append(f"{recipe.name} misses the target of {target:g} ({built.recall})")
    raise AssertionError("the last recipe is exact")


def _reason(recipe: Recipe, recall: Recall | None, rows: int, missed: list[str]) -> str:
    if recipe.name != "exact":
        reason = f"{recall}; {rows:,} rows are many for exact search without a GPU"
    elif missed:
        reason = "no other index finds enough"
    elif rows <= EXACT_ROWS:
        reason = f"{rows:,} rows are few enough for exact search"
    else:
        reason = "there is a GPU"
    return "; ".join([reason, *missed])
