"""Makes a database folder beside its place, continues it where it was killed, then moves it there.

What is done is written down shard by shard in ``build.json``, which becomes the manifest. Whoever
builds or imports gives a function that adds the shards that are missing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrodiff.databases.manifest import BUILD, MANIFEST, Manifest, Shard
from retrodiff.databases.shards import one_schema, reached
from retrodiff.databases.store import EmbeddingDatabase, open_database, unfinished
from retrodiff.files import make_folder
from retrodiff.locks import writing


class Work:
    """Shards that are being made in a folder, from the first row or from where it was left.

    Args:
        folder: where the shards and ``build.json`` are written.
        plan: the manifest to be, without shards.
        schema: of the records that are there already, which new ones have to agree with.
    """

    def __init__(self, folder: Path, plan: Manifest, schema: Any = None):
        self.folder, self.manifest, self.schema = folder, plan, schema
        self._agreed: set[str] = set()  # record files that the schema is of

    def run(self, resume: bool, fill: Callable[[Work], None]) -> Manifest:
        """Lets ``fill`` add what is missing; the manifest with all shards."""
        if resume and (self.folder / MANIFEST).is_file():
            # Killed between the last shard and the move to its place: all the work is done.
            done = Manifest.read(self.folder / MANIFEST)
            check_same(self.manifest, done, self.folder)
            self.manifest = done
            return done
        if resume and (self.folder / BUILD).is_file():
            begun = Manifest.read(self.folder / BUILD)
            check_same(self.manifest, begun, self.folder)
            self.manifest = begun
            self._remove_strays()
        else:
            clear(self.folder)
            self.manifest.write(self.folder / BUILD)
        try:
            fill(self)
        except ValueError:
            if not self.manifest.shards:
                shutil.rmtree(self.folder)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"no room to write into {self.folder} ({os.strerror(error.errno)}): make room, "
                "then continue (--resume)"
            ) from error
        return self.manifest

    @property
    def next(self) -> tuple[int, int]:
        """Where the source goes on: picture or part, and row of it."""
        return self.manifest.shards[-1].next if self.manifest.shards else (0, 0)

    def record(self, shard: Shard, skipped: Sequence[tuple[str, str]] = ()) -> None:
        """Writes down that a shard is complete, and all that has been skipped so far."""
        shards = (*self.manifest.shards, shard)
        self._agree(shards)
        self.manifest = replace(self.manifest, shards=shards, skipped=tuple(skipped))
        self.manifest.write(self.folder / BUILD)
        reached("shard recorded")

    def _agree(self, shards: Sequence[Shard]) -> None:
        """Refuses a column whose type differs from that of an earlier shard."""
        import pyarrow.parquet as pq

        for name in (str(shard.file("records")) for shard in shards):
            if name not in self._agreed:
                new = pq.read_schema(self.folder / name)
                known = [] if self.schema is None else [self.schema]
                called = [*(["the rows before"] if known else []), name]
                self.schema = one_schema([*known, new], called)
                self._agreed.add(name)

    def _remove_strays(self) -> None:
        known = {BUILD, *(name for shard in self.manifest.shards for name in shard.files)}
        for file in self.folder.iterdir():
            if file.name not in known:
                file.unlink()


def make_database(
    path: Path, plan: Manifest, fill: Callable[[Work], None], *, resume: bool, overwrite: bool
) -> EmbeddingDatabase:
    """Fills ``PATH.partial`` and puts it in its place; with ``resume`` a finished one is opened."""
    partial = path.with_name(path.name + ".partial")
    replacing_one = overwrite and unfinished(partial)
    if resume and (path / MANIFEST).is_file() and not replacing_one:
        found = open_database(path)
        check_same(plan, found.manifest, path)
        return found
    check_place(path, resume=resume, overwrite=overwrite)
    make_folder(partial)
    with writing(partial):
        done = Work(partial, plan).run(resume, fill)
        if (partial / BUILD).is_file():
            done.write(partial / BUILD)
            os.replace(partial / BUILD, partial / MANIFEST)
        reached("manifest written")
        move(partial, path)
    return open_database(path)


def check_same(plan: Manifest, begun: Manifest, path: Path) -> None:
    """Refuses to continue a build with another encoder, source or setting."""
    if (what := plan.fingerprint.disagreement(begun.fingerprint)) is not None:
        raise ValueError(f"{path} was begun with another encoder: {what}: start anew (--overwrite)")
    mine = plan.settings | plan.sources[0] | {"scale": plan.fingerprint.scale}
    theirs = begun.settings | begun.sources[0] | {"scale": begun.fingerprint.scale}
    for name, value in json.loads(json.dumps(mine)).items():
        if value != theirs.get(name):
            raise ValueError(
                f"{path} was begun with {name}={theirs.get(name)!r}, now {name}={value!r}: give "
                "the same, or start anew (--overwrite)"
            )


def clear(folder: Path) -> None:
    """Empties a folder."""
    for file in folder.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def check_place(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses to build where something is that was not said to be replaced or continued."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        if not overwrite:
            raise FileExistsError(
                f"{path} exists: choose another name, or overwrite it (--overwrite)"
            )
        if not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} is not a database, it is left alone: choose another name"
            )
    if unfinished(partial) and not resume and not overwrite:
        raise FileExistsError(
            f"{partial} is an unfinished build: continue it (--resume) or start anew (--overwrite)"
        )


def move(partial: Path, path: Path) -> None:
    """Puts a finished folder in its place; what was there goes only when it stands."""
    old = path.with_name(path.name + ".old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    reached("old one moved")
    os.replace(partial, path)
    if old.is_file():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
