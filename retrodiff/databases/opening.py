"""Opens a database by its address: a folder, the Hugging Face Hub, or tables of others."""

from __future__ import annotations

import warnings
from pathlib import Path

from retrodiff.databases.lance import LanceDatabase
from retrodiff.databases.parquet import ParquetDatabase
from retrodiff.databases.shared import open_shared
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.disk.files import given
from retrodiff.disk.shipped import shipped
from retrodiff.indexes import TARGET, Recipe
from retrodiff.indexes.recipe import EXACT_ROWS
from retrodiff.interfaces import Fingerprint
from retrodiff.text import printable


def open_database(
    path: str | Path,
    index: str | Recipe | None = None,
    *,
    fingerprint: Fingerprint | None = None,
    root: str | Path | None = None,
    token: str | None = None,
) -> EmbeddingDatabase | LanceDatabase | ParquetDatabase:
    """Opens a database by its address; nothing is read but its table of contents.

    Args:
        path: the folder; or ``hf://datasets/OWNER/NAME`` or ``hf://datasets/OWNER/NAME@REVISION``
            of a database on the Hugging Face Hub, whose files are fetched when they are needed; or
            ``lance://FOLDER/TABLE``, a LanceDB table written by `LanceDatabase.create`; or
            ``parquet://FOLDER``, parquet files with a column ``embedding`` (`ParquetDatabase`); or
            ``pictograms``, the database of a model that has a package of its own.
        index: name of a saved index, ``exact``, or a recipe (taken from beside the rows if it was
            saved there, else built and saved). None: exact, except that above two million rows
            of a folder the saved index of the highest measured recall is taken, if that is 0.95
            or more; where it cannot be opened, a warning says why. A shared index, a file of
            someone else's that goes to a native parser, is read only when it is named.
        fingerprint: of the encoder that made the embeddings: needed for the tables of others that
            do not say it, compared with any other database's own.
        root: folder that the records' files are relative to, if it has moved since the build.
        token: for a private shared database; None: the one of ``hf auth login``.

    Raises:
        FileNotFoundError: there is no finished database, or no index of that name.
        ValueError: the fingerprint is another one, or files are damaged.
        OSError: a shared database cannot be fetched.
    """
    address = str(path)
    shared = address.startswith("hf:")
    for scheme, opened in (("lance:", _open_table), ("parquet:", _open_parquet)):
        if address.startswith(scheme):
            return opened(address, index, fingerprint, root)
    if shared:
        database: EmbeddingDatabase = open_shared(address, root=root, token=token)
    else:
        model = shipped(path)
        database = EmbeddingDatabase.at(path if model is None else model / "database", root)
    if fingerprint is not None and (what := fingerprint.disagreement(database.fingerprint)):
        raise ValueError(f"fingerprint and the database at {printable(address)} disagree: {what}")
    if index is None:
        return database if shared else with_best_index(database)
    if isinstance(index, str):
        return database.open_index(index)
    if index.name == "exact":
        return database.with_index(index, index.build(database.vectors), None)
    if database.saved_indexes().get(index.name, (None,))[0] == index:
        return database.open_index(index.name)
    return database.build_index(index)


def _open_table(
    address: str,
    index: str | Recipe | None,
    fingerprint: Fingerprint | None,
    root: str | Path | None,
) -> LanceDatabase:
    folder, _, table = address.removeprefix("lance://").rpartition("/")
    if not folder or not table:
        raise ValueError(f"{address} is no address of a table: write lance://FOLDER/TABLE")
    if index not in (None, "exact"):
        raise ValueError(
            f"{address} is searched by LanceDB itself: leave the index out, or make one there"
        )
    return LanceDatabase.open(given(folder), table, fingerprint=fingerprint, root=root)


def _open_parquet(
    address: str,
    index: str | Recipe | None,
    fingerprint: Fingerprint | None,
    root: str | Path | None,
) -> ParquetDatabase:
    folder = address.removeprefix("parquet://")
    if not folder or folder == address:
        raise ValueError(f"{address} is no address of parquet files: write parquet://FOLDER")
    if index not in (None, "exact"):
        raise ValueError(
            f"{address} is searched exactly: leave the index out, or copy the rows into a database "
            "that keeps one (LanceDatabase.create)"
        )
    return ParquetDatabase.open(folder, fingerprint=fingerprint, root=root)


def with_best_index(database: EmbeddingDatabase) -> EmbeddingDatabase:
    """The same rows; more than two million are searched by their best saved index."""
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
