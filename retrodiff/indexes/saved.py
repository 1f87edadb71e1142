"""Saves an index as a folder, and loads it only if every byte is as it was written.

``index.json`` holds the recipe, the hash of the rows that the index was built from, its recall, and
size and SHA-256 of every other file. Other libraries read those files, and damaged ones can end the
process or give wrong neighbors: they are compared first, once per process for each state of a file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

from retrodiff.disk.files import check_free, make_folder, write_folder
from retrodiff.disk.hashed import about_file, check_file, file_digest, read_hashed, write_hashed
from retrodiff.indexes.recipe import RECIPES, Recall, Recipe, SavableIndex
from retrodiff.indexes.vectors import Vectors

FORMAT = 1
ABOUT = "index.json"
AGAIN = "build the index again, or delete that folder"
LARGEST = 2**20
"""Bytes of the largest ``index.json`` that is read."""

_FILES = re.compile(
    r"index\.(json|faiss)|axes\.safetensors|trees\.ann|graph\.(usearch|cagra)"
    r"|scann(/[\w.-]+\.(npy|pb|pbtxt))?"
)


class Saved(NamedTuple):
    """Content of ``index.json``.

    Args:
        recipe: what the index was built by.
        recall: what was measured.
        rows: hash of the rows that it was built from.
        files: file name -> {"bytes", "sha256"}; None: saved by an earlier version.
    """

    recipe: Recipe
    recall: Recall
    rows: str
    files: dict[str, dict[str, Any]] | None


class UncheckedIndex(UserWarning):
    """An index of an earlier version, without hashes: damage to its files is not noticed."""


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

    def write(partial: Path) -> None:
        try:
            index.save(partial)
        except Exception as error:  # each library has its own for a full disk
            reason = " ".join(str(error).split())
            raise OSError(
                f"the index {recipe.name} cannot be written into {partial} ({reason:.200}): make "
                f"room, then try again; what {folder} holds stays"
            ) from error
        files = {
            name: about_file(partial / name)
            for name in sorted(_own_files(partial))
            if (partial / name).is_file()
        }
        about = {
            "format": FORMAT,
            "recipe": {"name": recipe.name, **asdict(cast("Any", recipe))},
            "rows": rows,
            "recall": asdict(recall),
            "files": files,
        }
        write_hashed(partial / ABOUT, about)
        mode = (partial / ABOUT).stat().st_mode
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # some libraries write for the owner only

    write_folder(folder, write, marker=ABOUT, own=_own_files, overwrite=True)


def check_index_place(folder: Path) -> None:
    """Refuses, before the work, a folder that `save_index` could not write or replace."""
    try:
        make_folder(folder.parent)
    except OSError as error:
        reason = str(error).partition(": ")[0]
        raise type(error)(f"{reason}: keep the index in memory (save=False)") from None
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
    """The index of a folder; while another process replaces it, the old one or the new one.

    Args:
        folder: written by `save_index`.
        vectors: the rows that it was built of.
        rows: hash of the rows in their order.

    Raises:
        ValueError: it was built from other rows, or a file is not as it was written.
        FileNotFoundError: a file is missing.
    """
    while True:
        written = _when(folder)
        try:
            saved = read_saved(folder)
            if saved.rows != rows:
                raise ValueError(
                    f"index {folder} was built from rows {saved.rows[:12]}, the database has rows "
                    f"{rows[:12]}: build the index again"
                )
            _check_files(folder, saved)
            index = _loaded(folder, saved.recipe, vectors)
        except Exception:
            if _when(folder) == written:
                raise
        else:
            if _when(folder) == written:
                return index, saved.recipe, saved.recall
        # Built again meanwhile: what was read may be of both.


def _loaded(folder: Path, recipe: Recipe, vectors: Vectors) -> SavableIndex:
    try:
        return recipe.load(folder, vectors)
    except (ValueError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split())
        raise ValueError(f"index {folder} cannot be read ({reason:.300}): {AGAIN}") from None


def _check_files(folder: Path, saved: Saved) -> None:
    if saved.files is None:
        warnings.warn(
            f"index {folder} was saved without hashes by an earlier version, so damage to its "
            "files is not noticed: build it again",
            UncheckedIndex,
            stacklevel=5,
        )
        return
    for name, about in saved.files.items():
        check_file(folder / name, about, AGAIN)
    if others := {name for name in _own_files(folder) if (folder / name).is_file()} - {
        ABOUT,
        *saved.files,
    }:
        raise ValueError(f"{folder / min(others)} is none of the index's files: {AGAIN}")


def faults_of_index(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a saved index, in words; every byte is read."""
    try:
        saved = read_saved(folder)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if saved.files is None:
        yield "was saved without hashes by an earlier version and cannot be checked: build it again"
        return
    for name, about in saved.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != about["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes, expected {about['bytes']}"
        elif file_digest(file) != about["sha256"]:
            yield f"{name} has changed since it was written"


def saved_index(folder: Path) -> tuple[Recipe, Recall, str]:
    """Recipe, recall and hash of the rows of a saved index, without loading it."""
    return read_saved(folder)[:3]


def read_saved(folder: Path) -> Saved:
    """What ``index.json`` says about an index, without loading it.

    Raises:
        ValueError: it is damaged, or its format is newer than this version reads.
    """
    file = folder / ABOUT
    about = read_hashed(file, "a description of an index", AGAIN, most=LARGEST)
    if type(about.get("format")) is not int:
        raise ValueError(f"{file} is not a description of an index (no format number): {AGAIN}")
    if about["format"] > FORMAT:
        raise ValueError(f"{folder} has a newer format than {FORMAT}: upgrade retrodiff")
    try:
        options, measured = dict(about["recipe"]), about["recall"]
        name, rows, files = options.pop("name"), about["rows"], about.get("files")
        recall = Recall(measured["value"], measured["k"], measured["queries"])
        _check_types(name, rows, recall)
        if files is not None:
            _check_names(files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is damaged ({reason:.300}): {AGAIN}") from None
    if name not in RECIPES:
        raise ValueError(
            f"{file} names an unknown index {name[:40]!r}: upgrade retrodiff, or {AGAIN}"
        )
    try:
        return Saved(RECIPES[name](**options), recall, rows, files)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not fit {name} ({error}): {AGAIN}") from None


def _check_types(name: Any, rows: Any, recall: Recall) -> None:
    if not isinstance(name, str) or not isinstance(rows, str):
        raise ValueError("name and rows are no texts")
    counts = type(recall.k) is int and type(recall.queries) is int
    if type(recall.value) not in (int, float) or not 0 <= recall.value <= 1 or not counts:
        raise ValueError(f"a recall of {recall.value!r} at {recall.k!r}")


def _check_names(files: Any) -> None:
    for name, about in files.items():
        whole = type(about["bytes"]) is int and about["bytes"] >= 0
        if not _FILES.fullmatch(name) or not whole or type(about["sha256"]) is not str:
            raise ValueError(f"{name!r} is no file of an index")


def _when(folder: Path) -> tuple[int, int] | None:
    """Tells one saved index at a place from the next."""
    try:
        about = (folder / ABOUT).stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns
