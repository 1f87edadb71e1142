"""Adds rows to a database and takes rows out; readers keep what they opened.

New rows go into new shards, deleted rows into a list of row numbers that are passed over. Either
becomes true at the moment when the manifest is replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.build.ingest import Build, Engine
from retrodiff.databases.build.work import MAKE_ROOM, Work, clear, read_work
from retrodiff.databases.manifest import BUILD, LOG, MANIFEST, Manifest
from retrodiff.databases.records import TEXT
from retrodiff.databases.searchable import row_numbers
from retrodiff.databases.sources.folders import Source, check_ids, state_of
from retrodiff.databases.sources.skipped import warn_of
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.disk.files import (
    atomic_write,
    fault_point,
    make_folder,
    place,
    plain_json,
    room_for,
    sync_folder,
)
from retrodiff.disk.locks import write_lock
from retrodiff.disk.tensors import write_tensors
from retrodiff.interfaces import Encoder


def append_to_database(
    path: str | Path,
    source: Source,
    encoder: Encoder,
    *,
    workers: int = 0,
    engine: Engine = "local",
    resume: bool = False,
    progress: bool = True,
) -> EmbeddingDatabase:
    """Encodes more pictures and puts their rows behind the ones that are there.

    Args:
        path: the database.
        source: the pictures to add.
        encoder: the one that the database was built with.
        workers: processes that decode ahead.
        engine: ``local`` or ``ray``, as in `build_database`.
        resume: continue an append that was killed.
        progress: show a bar.

    Raises:
        ValueError: the encoder is not that of the database.
        FileExistsError: an earlier append is unfinished, and ``resume`` is not given.
    """
    path = _own_folder(path)
    database = EmbeddingDatabase.at(path)
    described = plain_json(source.describe())
    if (what := encoder.fingerprint.disagreement(database.fingerprint)) is not None:
        raise ValueError(f"encoder and {path} disagree: {what}: append with the encoder it has")
    partial = path / "append.partial"
    with write_lock(path):
        database = EmbeddingDatabase.at(path)
        manifest = database.manifest
        if (recorded := _recorded(partial, manifest)) is not None:
            _remove(partial)
            if resume and recorded.sources == (described,):
                warn_of(recorded.skipped)
                return database
        elif resume and not (partial / BUILD).is_file() and _is_last(described, manifest):
            if partial.is_dir():
                _remove(partial)
            return database  # finished: only tidying up was left
        if "id" in database.columns:
            check_ids(source, database.table(["id"])["id"])
        if (partial / BUILD).is_file() and not resume:
            raise FileExistsError(
                f"{partial} is an unfinished append: continue it (--resume) or delete that folder"
            )
        make_folder(partial)
        plan = replace(
            manifest,
            shards=(),
            skipped=(),
            deleted=None,
            settings={"batch_size": 64, "thumbnails": None, **manifest.settings},
            sources=(described,),
            trusted=None,
        )
        first = (len(manifest.shards), manifest.rows, len(manifest.sources))
        build = Build(
            source, encoder, workers=workers, engine=engine, progress=progress, first=first
        )
        schema = database._schema if manifest.shards else None
        with room_for(partial, MAKE_ROOM):
            added = Work(partial, plan, schema, state_of(source)).run(resume, build.fill)
            for shard in added.shards:
                for name in shard.files:
                    # Linked, not moved: a kill here leaves the append complete, to be resumed.
                    _link(partial / name, path / name)
            sync_folder(path)
            fault_point("append linked")
            text = {name: added.settings[name] for name in (TEXT,) if name in added.settings}
            replace(
                manifest,
                settings=manifest.settings | text,
                shards=manifest.shards + added.shards,
                skipped=manifest.skipped + added.skipped,
                sources=manifest.sources + added.sources,
                trusted=manifest.roots | added.roots,
            ).write(path / MANIFEST)
            fault_point("append recorded")
        _remove(partial)
    warn_of(added.skipped)
    return EmbeddingDatabase.at(path)


def delete_rows(path: str | Path, rows: Tensor | Sequence[int]) -> EmbeddingDatabase:
    """Takes rows out of a database; the ones behind them move up.

    Args:
        path: the database.
        rows: row numbers (n,), as they are now; for a condition, ``database.where(...).rows``.

    Raises:
        ValueError: no row would be left, or a number is no row.
    """
    path = _own_folder(path)
    with write_lock(path):
        database = EmbeddingDatabase.at(path)
        make_folder(path)  # says in one line if nothing can be written
        chosen = row_numbers(rows).unique()
        hidden = database.stored(database._checked(chosen))
        if database.hidden is not None:
            hidden = torch.cat([hidden, database.hidden]).sort().values
        if len(hidden) == len(database.vectors):
            raise ValueError(f"that would delete every row of {path}: delete the folder instead")
        if not len(chosen):
            return database
        name = f"deleted-{hashlib.sha256(hidden.numpy().tobytes()).hexdigest()[:12]}.safetensors"
        with room_for(path, "make room, then try again; nothing was deleted"):
            about = write_tensors(path / name, {"rows": hidden})
            fault_point("deletion written")
            deleted = {"file": name, "rows": len(hidden), **about}
            replace(database.manifest, deleted=deleted).write(path / MANIFEST)
    return EmbeddingDatabase.at(path)


def _own_folder(path: str | Path) -> Path:
    """The folder of a database that may be changed."""
    if str(path).startswith("hf:"):
        raise ValueError(
            f"shared databases are read-only: {path} cannot be changed: change the folder it was "
            "pushed from, and push again"
        )
    return place(path)


def _recorded(partial: Path, manifest: Manifest) -> Manifest | None:
    """What an append wrote down, if the database has all of it: only tidying up was left."""
    if not (partial / BUILD).is_file():
        return None
    begun = read_work(partial).manifest
    done = bool(begun.shards) and manifest.shards[-len(begun.shards) :] == begun.shards
    return begun if done else None


def _is_last(described: dict[str, Any], manifest: Manifest) -> bool:
    """Whether a source is the one that was added last, as far as its description can tell."""
    return described == manifest.sources[-1] and described.get("mark") != ""


def _remove(partial: Path) -> None:
    """Removes a finished append, last of all what says that it is one."""
    for file in partial.iterdir():
        if file.name not in (BUILD, LOG):
            file.unlink()
    fault_point("append half removed")
    clear(partial)
    partial.rmdir()


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with atomic_write(target) as partial:
            shutil.copyfile(source, partial)
