"""Makes a database folder beside its place, continues it where it was killed, then moves it there.

What the work depends on is written into ``build.json``, and each finished shard as one line of
``shards.jsonl`` with the hash of all that came before, so that writing one costs the same however
many there are. Whoever builds or imports gives a function that adds the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from retrodiff.databases.manifest import BUILD, LOG, MANIFEST, Manifest, Shard
from retrodiff.databases.opening import with_best_index
from retrodiff.databases.records import (
    AS_TEXT,
    NAMES,
    TEXT,
    example,
    is_text,
    one_schema,
    read_schema,
)
from retrodiff.databases.store import EmbeddingDatabase, unfinished
from retrodiff.disk.files import (
    REPLACED,
    atomic_write,
    beside,
    check_free,
    fault_point,
    foreign,
    make_folder,
    place,
    plain_json,
    put,
    repair,
    room_for,
    sync,
)
from retrodiff.disk.hashed import about_file
from retrodiff.disk.locks import write_lock
from retrodiff.indexes.saved import own_index_files

_FILES = re.compile(
    r"(manifest\.json|build\.json|shards\.jsonl|\.probe|replaced"
    r"|(vectors|thumbnails)-\d{6,}\.safetensors|records-\d{6,}\.parquet"
    r"|deleted-[0-9a-f]{12}\.safetensors)(\.partial)?"
)


MAKE_ROOM = "make room, then continue (--resume)"


class MixedColumn(UserWarning):
    """A column whose values have several types, or one that a table cannot hold, is text."""


class Work:
    """Shards that are being made in a folder, from the first row or from where it was left.

    Args:
        folder: where the shards and ``build.json`` are written.
        plan: the manifest to be, without shards.
        schema: of the records that are there already, which new ones have to agree with.
        state: hash of the source's files as they are now, compared when the work is continued;
            None where nothing is known of them.
    """

    def __init__(self, folder: Path, plan: Manifest, schema: Any = None, state: str | None = None):
        self.folder, self.manifest, self.schema, self.state = folder, plan, schema, state
        self._before = "the rows before"
        self._text: set[str] = set(plan.settings.get(TEXT, ()))
        self._warned = set(self._text)
        self._chain = ""
        self._logged = 0

    def run(self, resume: bool, fill: Callable[[Work], None]) -> Manifest:
        """Lets ``fill`` add what is missing; the manifest with all shards."""
        if resume and (self.folder / MANIFEST).is_file():
            # Killed between the last shard and the move to its place: all the work is done.
            done = Manifest.read(self.folder / MANIFEST)
            check_same(self.manifest, done, self.folder)
            if len(whole_shards(self.folder, done.shards)) < len(done.shards):
                raise ValueError(
                    f"files in {self.folder} have changed since they were written: start anew "
                    "(--overwrite)"
                )
            self.manifest = done
            return done
        try:
            if resume and (self.folder / BUILD).is_file():
                self._continue()
            else:
                clear(self.folder)
                self._begin()
            fill(self)
        except ValueError:
            if not self.manifest.shards and not resume:
                clear(self.folder)
                with suppress(OSError):
                    self.folder.rmdir()
            raise
        if self._text:
            settings = {**self.manifest.settings, TEXT: sorted(self._text)}
            self.manifest = replace(self.manifest, settings=settings)
        return self.manifest

    @property
    def next(self) -> tuple[int, int]:
        """Where the source goes on: picture or part, and row of it."""
        return self.manifest.shards[-1].next if self.manifest.shards else (0, 0)

    def record(self, shard: Shard, skipped: Sequence[tuple[str, str]] = ()) -> None:
        """Writes down that a shard is complete, and all that has been skipped so far."""
        self._compare(shard)
        self._log(shard, skipped[self._logged :])
        shards = (*self.manifest.shards, shard)
        self.manifest = replace(self.manifest, shards=shards, skipped=tuple(skipped))
        fault_point("shard recorded")

    def _begin(self) -> None:
        """Writes down what the work depends on."""
        self.manifest.write(self.folder / BUILD)
        self._chain = _sha256((self.folder / BUILD).read_bytes().hex())
        with atomic_write(self.folder / LOG) as partial:
            partial.write_text(self._line({"state": self.state}))

    def _line(self, entry: Any) -> str:
        text = json.dumps(entry)
        self._chain = _sha256(self._chain + text)
        return f"{self._chain} {text}\n"

    def _continue(self) -> None:
        """Takes up what another process has left, as far as it is whole."""
        left = read_work(self.folder)
        check_same(self.manifest, left.manifest, self.folder)
        if left.logged and left.state != self.state:
            raise ValueError(
                f"the pictures have changed since {self.folder} was begun: put back the ones that "
                "it was begun with, or start anew (--overwrite)"
            )
        shards = left.manifest.shards
        whole = whole_shards(self.folder, shards)
        if len(whole) < len(shards):
            warnings.warn(
                f"{', '.join(shards[len(whole)].files)} in {self.folder} are not as they were "
                f"written: rows from {sum(shard.rows for shard in whole)} on are made again",
                stacklevel=6,
            )
        if left.logged:
            os.truncate(self.folder / LOG, left.ends[len(whole)])
            self._chain = left.chains[len(whole)]
            self.manifest = replace(left.manifest, shards=(), skipped=())
        else:
            self.manifest = replace(left.manifest, shards=(), skipped=())
            self._begin()
        known = {BUILD, LOG, *(name for shard in whole for name in shard.files)}
        for name in own_files(self.folder) - known:
            (self.folder / name).unlink(missing_ok=True)
        _check_alone(self.folder)
        for shard, skipped in zip(whole, left.skipped, strict=False):
            self._compare(shard)
            if not left.logged:
                self._log(shard, skipped)
        skipped = [one for some in left.skipped[: len(whole)] for one in some]
        self._logged = len(skipped)
        self.manifest = replace(self.manifest, shards=tuple(whole), skipped=tuple(skipped))

    def _log(self, shard: Shard, skipped: Sequence[tuple[str, str]]) -> None:
        line = self._line(plain_json({"shard": asdict(shard), "skipped": list(skipped)}))
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            sync(file.fileno())
        self._logged += len(skipped)

    def _compare(self, shard: Shard) -> None:
        """Notes and warns once of each column that is text because its values differ in type."""
        name = str(shard.file("records"))
        new, known = read_schema(self.folder / name), self.schema
        self.schema = one_schema([new] if known is None else [known, new])
        for column in new:
            why = (column.metadata or {}).get(AS_TEXT)
            reason = None if why is None else f"it holds {why.decode('utf-8', 'replace')}"
            if known is not None and column.name in known.names:
                differs = self._difference(name, known.field(column.name).type, column)
                if differs is not None:
                    self._text.add(column.name)
                    reason = reason or differs
            if reason is not None and column.name not in self._warned:
                self._warned.add(column.name)
                message = f"column {column.name!r} is stored as text: {reason}"
                warnings.warn(message, MixedColumn, stacklevel=6)
        self._before = "earlier rows"

    def _difference(self, name: str, before: Any, column: Any) -> str | None:
        """Why a column becomes text in a shard, in words; None: for no other shard's sake."""
        joined = self.schema.field(column.name).type
        if not is_text(joined) or all(
            is_text(kind, or_null=True) for kind in (before, column.type)
        ):
            return None
        if joined not in (before, column.type):
            return f"it is {before} in {self._before} and {column.type} in {name}"
        shown = example(_read(self.folder / name, column.name), column.name)
        return f"it is {before} in {self._before}, but {shown}"


def make_database(
    path: str | Path,
    plan: Manifest,
    fill: Callable[[Work], None],
    *,
    resume: bool,
    overwrite: bool,
    state: str | None = None,
) -> EmbeddingDatabase:
    """Fills ``PATH.partial`` and puts it in its place; with ``resume`` a finished one is opened."""
    path = place(path)
    partial = beside(path)
    replacing_one = overwrite and unfinished(partial)
    if resume and (path / MANIFEST).is_file() and not replacing_one:
        found = with_best_index(EmbeddingDatabase.at(path))
        with suppress(ValueError) if overwrite else nullcontext():
            check_same(plan, found.manifest, path)
            return found
    check_place(path, resume=resume, overwrite=overwrite)
    with (
        write_lock(path) if path.exists() else nullcontext(),
        write_lock(partial, make=make_folder),
        _no_empty_folder(partial),
    ):
        repair(path, MANIFEST, own_files)
        check_place(path, resume=resume, overwrite=overwrite)
        if (partial / REPLACED).is_file():
            clear(partial)  # killed when it had changed places with the new one
        with room_for(partial, MAKE_ROOM):
            done = Work(partial, plan, state=state).run(resume, fill)
            if not (partial / MANIFEST).is_file():
                done.write(partial / MANIFEST)
            fault_point("manifest written")
            for name in (BUILD, LOG):
                (partial / name).unlink(missing_ok=True)
            put(partial, path, MANIFEST, own_files, overwrite)
    return with_best_index(EmbeddingDatabase.at(path))


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes a folder if the block fails before anything is in it."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


@dataclass
class Left:
    """State of unfinished work, as its folder records it.

    Args:
        manifest: with the shards that are done.
        skipped: what was skipped before the end of each shard.
        state: of the source's files when it was begun.
        chains: hash of the log after its first line, and after each shard.
        ends: size of the log there.
        logged: False: by an earlier version, which had no log.
    """

    manifest: Manifest
    skipped: list[list[tuple[str, str]]] = field(default_factory=list)
    state: str | None = None
    chains: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    logged: bool = True


def read_work(folder: Path) -> Left:
    """Reads the state of unfinished work; a last line that was cut off is left out."""
    begun = Manifest.read(folder / BUILD)
    if not (folder / LOG).is_file():
        skipped = [list(begun.skipped), *([[]] * len(begun.shards))][: len(begun.shards)]
        return Left(begun, skipped, logged=False)
    left, shards, end = Left(begun), list[Shard](), 0
    chain = _sha256((folder / BUILD).read_bytes().hex())
    for number, line in enumerate((folder / LOG).read_bytes().split(b"\n")[:-1]):
        digest, _, text = line.decode("utf-8", "replace").partition(" ")
        chain, end = _sha256(chain + text), end + len(line) + 1
        if digest != chain:
            raise ValueError(
                f"{folder / LOG} is damaged in line {number + 1}, or {BUILD} beside it: start anew "
                "(--overwrite)"
            )
        entry = json.loads(text)
        if number == 0:
            left.state = entry["state"]
        else:
            shards.append(Shard.of(entry["shard"]))
            left.skipped.append([(name, reason) for name, reason in entry["skipped"]])
        left.chains.append(chain)
        left.ends.append(end)
    if not left.ends:
        return Left(begun, logged=False)
    flat = tuple(one for some in left.skipped for one in some)
    left.manifest = replace(begun, shards=tuple(shards), skipped=flat)
    return left


def whole_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The first shards whose files are as they were written: every byte is read."""
    whole: list[Shard] = []
    for shard in shards:
        for name, about in shard.files.items():
            file = folder / name
            if not file.is_file() or about_file(file) != {k: about[k] for k in ("bytes", "sha256")}:
                return whole
        whole.append(shard)
    return whole


def check_same(plan: Manifest, begun: Manifest, path: Path) -> None:
    """Refuses to continue a build with another encoder, source or setting."""
    if (what := plan.fingerprint.disagreement(begun.fingerprint)) is not None:
        raise ValueError(f"{path} was begun with another encoder: {what}: start anew (--overwrite)")
    mine = plan.settings | plan.sources[0] | {"scale": plan.fingerprint.scale}
    theirs = begun.settings | begun.sources[0] | {"scale": begun.fingerprint.scale}
    for name, value in plain_json(mine).items():
        if value != theirs.get(name):
            raise ValueError(
                f"{path} was begun with {name}={theirs.get(name)!r}, now {name}={value!r}: give "
                "the same, or start anew (--overwrite)"
            )


def own_files(folder: Path) -> set[str]:
    """The files of a database's folder, or of unfinished work, that this package wrote."""
    found = {file.name for file in folder.iterdir() if _FILES.fullmatch(file.name)}
    for name in ("indexes", "append.partial"):
        inside = folder / name
        if inside.is_dir() and not inside.is_symlink():
            own = own_files(inside) if name == "append.partial" else own_index_files(inside)
            found |= {name, *(f"{name}/{file}" for file in own)}
    return found


def clear(folder: Path) -> None:
    """Removes all that unfinished work has left in a folder; refuses if anything else is there."""
    _check_alone(folder)
    first = [REPLACED, MANIFEST, BUILD]  # what remains after a kill is not taken for work
    for name in sorted(own_files(folder), key=lambda name: (name not in first[1:], name)):
        file = folder / name
        if name != REPLACED and (file.is_symlink() or not file.is_dir()):
            file.unlink(missing_ok=True)
    for inside in ("append.partial", "indexes"):
        for root, _, _ in os.walk(folder / inside, topdown=False):
            Path(root).rmdir()
    (folder / REPLACED).unlink(missing_ok=True)


def _check_alone(folder: Path) -> None:
    if others := foreign(folder, own_files(folder)):
        raise FileExistsError(
            f"{folder} also holds {', '.join(others[:3])}, which no build wrote: move that away"
        )


def check_place(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses to build where something is that was not said to be replaced or continued."""
    check_free(path, MANIFEST, overwrite, own_files)
    partial = beside(path)
    if unfinished(partial) and not resume and not overwrite:
        raise FileExistsError(
            f"{partial} is an unfinished build: continue it (--resume) or start anew (--overwrite)"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read(file: Path, column: str) -> Any:
    import pyarrow.parquet as pq

    with file.open("rb") as opened:
        names = pq.read_schema(opened).names
        return pq.read_table(opened, columns=list({column, *NAMES} & set(names)))
