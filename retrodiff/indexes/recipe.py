"""Builds, measures, saves and reopens indexes, whatever their kind.

A recipe holds hyper-parameters; ``build`` makes an index from vectors. A saved index carries the
fingerprint of the rows that it was built from, and its recall against the exact search on them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from retrodiff.files import check_free, write_folder, write_json
from retrodiff.indexes.annoy import Annoy
from retrodiff.indexes.cuvs import CuVS
from retrodiff.indexes.exact import Exact
from retrodiff.indexes.faiss import Faiss
from retrodiff.indexes.scann import ScaNN
from retrodiff.indexes.usearch import USearch
from retrodiff.indexes.vectors import Vectors
from retrodiff.interfaces import Index

FORMAT = 1
ABOUT = "index.json"
_FILES = re.compile(
    r"index\.(json|faiss)|axes\.safetensors|trees\.ann|graph\.(usearch|cagra)"
    r"|scann(/[\w.-]+\.(npy|pb|pbtxt))?"
)
EXACT_ROWS = 1_000_000
"""Up to here exact search is the automatic choice on a CPU."""
RECIPES: dict[str, type[Any]] = {r.name: r for r in (Exact, Annoy, USearch, Faiss, ScaNN, CuVS)}


class SavableIndex(Index, Protocol):
    """An index that can be written into a folder."""

    def save(self, folder: Path) -> None:
        """Writes what `Recipe.load` needs."""
        ...


class Recipe(Protocol):
    """Hyper-parameters of an index: a frozen dataclass of JSON-able values."""

    @property
    def name(self) -> str:
        """What it is called on a command line and on disk."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, vectors: Vectors, progress: bool = False) -> SavableIndex:
        """The index over these vectors."""
        ...

    def load(self, folder: Path, vectors: Vectors) -> SavableIndex:
        """The index that was saved in the folder."""
        ...


@dataclass(frozen=True)
class Recall:
    """Share of the true k nearest that an index finds, on the user's own vectors.

    Args:
        value: in [0, 1].
        k: neighbors asked for.
        queries: rows that were asked for their neighbors (each one's own row is left out).
    """

    value: float
    k: int
    queries: int

    def __str__(self) -> str:
        return f"recall@{self.k} {self.value:.3f} on {self.queries} rows"


def recall_of(
    index: Index, vectors: Vectors, k: int = 20, queries: int = 256, seed: int = 0
) -> Recall:
    """Asks an index and the exact search for the neighbors of some of the rows themselves."""
    m = len(vectors)
    k = min(k, m - 1)
    if k < 1:
        return Recall(1.0, 0, 0)
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:queries]
    asked = vectors.rows(rows)
    truth = Exact().build(vectors).search(asked, k + 1)[1]
    found = index.search(asked, k + 1)[1]
    hits = total = 0
    for row, true, got in zip(rows.tolist(), truth.tolist(), found.tolist(), strict=True):
        wanted = set([r for r in true if r != row][:k])
        hits += len(wanted & set(got))
        total += len(wanted)
    return Recall(hits / total, k, len(rows))


def save_index(
    index: SavableIndex, recipe: Recipe, folder: Path, rows: str, recall: Recall
) -> None:
    """Writes an index into a folder, all at once.

    Args:
        index: what the recipe built.
        recipe: its hyper-parameters.
        folder: replaced if it exists.
        rows: hash of the rows that the index was built from.
        recall: what was measured.
    """
    about = {
        "format": FORMAT,
        "recipe": {"name": recipe.name, **asdict(recipe)},
        "rows": rows,
        "recall": asdict(recall),
    }

    def write(partial: Path) -> None:
        try:
            index.save(partial)
        except Exception as error:  # each library has its own for a full disk
            reason = " ".join(str(error).split())
            raise OSError(
                f"the index {recipe.name} cannot be written into {partial} ({reason:.200}): make "
                f"room, then try again; what {folder} holds stays"
            ) from error
        write_json(partial / ABOUT, about)
        mode = (partial / ABOUT).stat().st_mode
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # some libraries write for the owner only

    write_folder(folder, write, marker=ABOUT, own=_own_files, overwrite=True)


def check_index_place(folder: Path) -> None:
    """Refuses, before the work, a folder that `save_index` could not replace."""
    check_free(folder, ABOUT, True, _own_files)


def own_index_files(folder: Path) -> set[str]:
    """The files below a folder of indexes that `save_index` wrote, relative to it."""
    found: set[str] = set()
    for inside in folder.iterdir():
        if inside.name.partition(".")[0] in RECIPES and inside.is_dir():
            found |= {inside.name, *(f"{inside.name}/{name}" for name in _own_files(inside))}
    return found


def _own_files(folder: Path) -> set[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return {name for name in names if _FILES.fullmatch(name)}


def load_index(folder: Path, vectors: Vectors, rows: str) -> tuple[SavableIndex, Recipe, Recall]:
    """The index of a folder, refused if it was built from other rows."""
    while True:
        written = _when(folder)
        try:
            recipe, recall, built_from = saved_index(folder)
            if built_from != rows:
                raise ValueError(
                    f"index {folder} was built from rows {built_from[:12]}, the database has rows "
                    f"{rows[:12]}: build the index again"
                )
            index = recipe.load(folder, vectors)
        except Exception:
            if _when(folder) == written:
                raise
        else:
            if _when(folder) == written:
                return index, recipe, recall
        # Built again meanwhile: what was read may be of both.


def _when(folder: Path) -> tuple[int, int] | None:
    """Tells one saved index at a place from the next."""
    try:
        about = (folder / ABOUT).stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def saved_index(folder: Path) -> tuple[Recipe, Recall, str]:
    """Recipe, recall and hash of the rows of a saved index, without loading it."""
    file = folder / ABOUT
    again = "build the index again, or delete that folder"
    try:
        about = json.loads(file.read_text("utf-8"))
        newer = int(about["format"]) > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no description of an index ({error!r}): {again}") from None
    if newer:
        raise ValueError(f"{folder} has a newer format than {FORMAT}: upgrade retrodiff")
    try:
        options, measured = dict(about["recipe"]), dict(about["recall"])
        name, rows = str(options.pop("name")), str(about["rows"])
        value = float(measured["value"])
        recall = Recall(value, int(measured["k"]), int(measured["queries"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {again}") from None
    if name not in RECIPES:
        raise ValueError(f"{file} names an unknown index {name!r}: upgrade retrodiff, or {again}")
    try:
        return RECIPES[name](**options), recall, rows
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not fit {name} ({error}): {again}") from None


def recipe_from_string(text: str) -> Recipe:
    """The recipe that a command line names: ``annoy``, ``annoy:trees=20,rerank=200``."""
    name, _, options = text.partition(":")
    if name not in RECIPES:
        raise ValueError(f"unknown index {name!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    known = {f.name: f for f in fields(recipe)}
    values: dict[str, Any] = {}
    last = ""
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals and isinstance(values.get(last), str):
            values[last] += f",{option}"  # a faiss factory has commas of its own
            continue
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; it has: {', '.join(known)}")
        values[key] = value if "str" in str(known[key].type) else _whole(name, key, value)
        last = key
    return recipe(**values)


def _whole(recipe: str, option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{recipe} takes a whole number as {option}, not {text!r}: such as {recipe}:{option}=20"
        ) from None
