"""Opens a database by its address: a folder, the Hugging Face Hub, or a LanceDB table."""

from __future__ import annotations

import warnings
from pathlib import Path

from retrodiff.databases.lance import LanceDatabase
from retrodiff.databases.shared import open_shared
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.disk.files import given
from retrodiff.indexes import TARGET, Recipe
from retrodiff.indexes.recipe import EXACT_ROWS


def open_database(
    path: str | Path,
    index: str | Recipe | None = None,
    *,
    root: str | Path | None = None,
    token: str | None = None,
) -> EmbeddingDatabase | LanceDatabase:
    """Opens a database by its address; nothing is read but its table of contents.

    Args:
        path: the folder; or ``hf://datasets/OWNER/NAME`` or ``hf://datasets/OWNER/NAME@REVISION``
            of a database on the Hugging Face Hub, whose files are fetched when they are needed; or
            ``lance://FOLDER/TABLE``, a LanceDB table written by `LanceDatabase.create`.
        index: name of a saved index, ``exact``, or a recipe (taken from beside the rows if it was
            saved there, else built and saved). None: exact, except that above a million rows
            of a folder the saved index of the highest measured recall is taken, if that is 0.95
            or more; where it cannot be opened, a warning says why. A shared index, a file of
            someone else's that goes to a native parser, is read only when it is named.
        root: folder that the records' files are relative to, if it has moved since the build.
        token: for a private shared database; None: the one of ``hf auth login``.
    """
    address = str(path)
    shared = address.startswith("hf:")
    if address.startswith("lance:"):
        return _open_table(address, index, root)
    if shared:
        database: EmbeddingDatabase = open_shared(address, root=root, token=token)
    else:
        database = EmbeddingDatabase.at(path, root)
    if index is None:
        return database if shared else with_best_index(database)
    if isinstance(index, str):
        return database.open_index(index)
    if index.name == "exact":
        return database.with_index(index, index.build(database.vectors), None)
    if database.saved_indexes().get(index.name, (None,))[0] == index:
        return database.open_index(index.name)
    return database.build_index(index)


def _open_table(address: str, index: str | Recipe | None, root: str | Path | None) -> LanceDatabase:
    folder, _, table = address.removeprefix("lance://").rpartition("/")
    if not folder or not table:
        raise ValueError(f"{address} is no address of a table: write lance://FOLDER/TABLE")
    if index not in (None, "exact"):
        raise ValueError(
            f"{address} is searched by LanceDB itself: leave the index out, or make one there"
        )
    return LanceDatabase.open(given(folder), table, root=root)


def with_best_index(database: EmbeddingDatabase) -> EmbeddingDatabase:
    """The same rows; a million and more are searched by their best saved index."""
    if len(database) <= EXACT_ROWS:
        return database
    try:
        saved = database.saved_indexes().items()
        good = [(recall.value, name) for name, (_, recall) in saved if recall.value >= TARGET]
        return database.open_index(max(good)[1]) if good else database
    except (ValueError, OSError) as error:
        message = f"{database.address} is searched exactly, without its saved index: {error}"
        warnings.warn(message, stacklevel=3)
        return database
