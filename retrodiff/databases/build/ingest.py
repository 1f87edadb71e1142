"""Builds a database from pictures: streaming, in constant memory, resumed where it was killed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from retrodiff.databases.build.encoding import Batch, encode_here
from retrodiff.databases.build.ray import encode_with_ray
from retrodiff.databases.build.work import Work, make_database
from retrodiff.databases.digests import SHARD_ROWS
from retrodiff.databases.manifest import Manifest
from retrodiff.databases.row_files import ShardBuffer
from retrodiff.databases.sources.folders import Source, check_ids, state_of
from retrodiff.databases.sources.skipped import skipped_message, warn_of
from retrodiff.databases.storable import storable
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.interfaces import Encoder
from retrodiff.numbers import whole
from retrodiff.progress import progress_bar

Engine = Literal["local", "ray"]
ENGINES = {"local": encode_here, "ray": encode_with_ray}


def build_database(
    path: str | Path,
    source: Source,
    encoder: Encoder,
    *,
    batch_size: int = 64,
    thumbnails: int | None = None,
    thumbnail_quality: int | None = None,
    shard_rows: int = SHARD_ROWS,
    workers: int = 0,
    engine: Engine = "local",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingDatabase:
    """Encodes every picture of a source and writes the rows into a folder.

    The folder appears when all is done; until then the work lies in ``PATH.partial``. Pictures that
    cannot be read are skipped, named in one warning at the end and in the manifest. An ``id`` that
    two pictures share is refused before anything is encoded.

    Args:
        path: folder to be made.
        source: `ImageFolder`, `Images`, ``Patchify(...).over(source)`` or any `Source`.
        encoder: what places the pictures.
        batch_size: pictures per call of the encoder.
        thumbnails: longest side of a small copy kept of every picture; None: none is kept, the
            source's files are read again when a row is shown.
        thumbnail_quality: 1 to 100: thumbnails are WebP files of this quality, a fifth of the size;
            None: they are PNG files up to 64 pixels, JPEG files above.
        shard_rows: rows per file; a killed build loses at most the shard it was filling.
        workers: processes that decode ahead; 0: none. With Ray: actors that hold the encoder.
        engine: ``local``: in this process; ``ray``: as a Ray Data job on the Ray cluster that is
            running, or on a new one on this machine (extra ``retrodiff[ray]``).
        resume: continue a build that was killed; a finished one is opened.
        overwrite: replace what is there, once the new one is done.
        progress: show a bar.

    Raises:
        ValueError: no picture can be read, two have one ``id``, or a number is out of range; with
            ``resume``, pictures, encoder or settings are not those it was begun with.
        FileExistsError: there is something at the path, or an unfinished build, and neither
            ``resume`` nor ``overwrite`` is given.
    """
    settings = {
        "batch_size": whole("batch_size", batch_size),
        "shard_rows": whole("shard_rows", shard_rows),
        "thumbnails": None if thumbnails is None else whole("thumbnails", thumbnails),
    }
    if thumbnail_quality is not None:
        if thumbnails is None:
            raise ValueError("thumbnail_quality= is of thumbnails: give thumbnails=SIDE, too")
        settings["thumbnail_quality"] = whole("thumbnail_quality", thumbnail_quality, most=100)
    plan = Manifest(encoder.fingerprint, settings=settings, sources=(source.describe(),))
    build = Build(source, encoder, workers=workers, engine=engine, progress=progress)
    options = {"resume": resume, "overwrite": overwrite, "state": state_of(source)}
    database = make_database(path, plan, build.fill, **options)
    warn_of(database.manifest.skipped)
    return database


class Build:
    """The encoding of a source into shards.

    Args:
        source: the pictures.
        encoder: what places them.
        workers: processes that decode ahead, or encode.
        engine: where the work is done.
        progress: show a bar.
        first: number of the first shard, of its first row, and of the source.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        *,
        workers: int,
        engine: Engine,
        progress: bool,
        first: tuple[int, int, int] = (0, 0, 0),
    ):
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r}: give one of {', '.join(ENGINES)}")
        self.source, self.encoder = source, encoder
        self.workers, self.engine, self.progress = whole("workers", workers, 0), engine, progress
        self.first_shard, self.first_row, self.source_number = first
        self.skipped: list[tuple[str, str]] = []

    def fill(self, work: Work) -> None:
        """Adds the shards that are missing."""
        total = len(self.source)
        if total == 0:
            raise ValueError("the source holds no pictures: nothing to build a database from")
        check_ids(self.source)
        self.skipped = list(work.manifest.skipped)
        buffer = ShardBuffer(work.manifest.settings["shard_rows"], self.encoder.dim)
        at = work.next
        with progress_bar(total, "database", self.progress, initial=at[0], unit="img") as bar:
            for batch in self._batches(work):
                self.skipped += batch.skipped
                self._add(batch, buffer, work)
                bar.update(batch.next[0] - at[0])
                at = batch.next
                if buffer.room == 0:
                    self._commit(work, buffer, at)
            if buffer.count:
                self._commit(work, buffer, at)
        if not work.manifest.shards:
            raise ValueError(f"no picture could be read; {skipped_message(self.skipped)}")
        work.manifest = replace(work.manifest, skipped=tuple(self.skipped))

    def _batches(self, work: Work) -> Iterator[Batch]:
        encode = ENGINES[self.engine]
        settings = work.manifest.settings
        yield from encode(self.source, self.encoder, settings, work.next, self.workers)

    def _add(self, batch: Batch, buffer: ShardBuffer, work: Work) -> None:
        first = self.first_row + work.manifest.rows + buffer.count

        def name(row: int) -> str:
            return f"{batch.records[row].get('file', 'image')} (row {first + row})"

        stored, norms = storable(batch.embeddings, work.manifest.fingerprint.encoder, name)
        buffer.add(stored, norms, batch.records, batch.thumbnails)

    def _commit(self, work: Work, buffer: ShardBuffer, at: tuple[int, int]) -> None:
        number = self.first_shard + len(work.manifest.shards)
        work.record(buffer.write(work.folder, number, at, self.source_number), self.skipped)
