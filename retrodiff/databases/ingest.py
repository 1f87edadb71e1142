"""Builds a database from pictures: streaming, in constant memory, continuing where it was killed.

Batches end where shards end and depend on row numbers only, so an interrupted build that is resumed
gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.fingerprint import SHARD_ROWS
from retrodiff.databases.images import UnreadableImage, thumbnail, to_float
from retrodiff.databases.manifest import BUILD, MANIFEST, Manifest, Shard
from retrodiff.databases.shards import ShardBuffer, reached
from retrodiff.databases.sources import Item, Source
from retrodiff.databases.store import EmbeddingDatabase, open_database, unfinished
from retrodiff.databases.views import storable
from retrodiff.files import make_folder, writing
from retrodiff.interfaces import Encoder
from retrodiff.progress import progress_bar


class SkippedPictures(UserWarning):
    """Some pictures could not be read and are not in the database."""


def build_database(
    path: str | Path,
    source: Source,
    encoder: Encoder,
    *,
    batch_size: int = 64,
    thumbnails: int | None = None,
    shard_rows: int = SHARD_ROWS,
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingDatabase:
    """Encodes every picture of a source and writes the rows into a folder.

    The folder appears when all is done; until then the work lies in ``PATH.partial``. Pictures that
    cannot be read are skipped, named in one warning at the end and in the manifest.

    Args:
        path: folder to be made.
        source: `ImageFolder`, `Images`, ``Patchify(...).over(source)`` or any `Source`.
        encoder: what places the pictures.
        batch_size: pictures per call of the encoder.
        thumbnails: longest side of a small copy kept of every picture; None: none is kept, the
            source's files are read again when a row is shown.
        shard_rows: rows per file; a killed build loses at most the shard it was filling.
        workers: processes that decode ahead; 0: none.
        resume: continue a build that was killed; a finished one is opened.
        overwrite: replace what is there, once the new one is done.
        progress: show a bar.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    settings = {"batch_size": batch_size, "shard_rows": shard_rows, "thumbnails": thumbnails}
    plan = Manifest(encoder.fingerprint, settings=settings, sources=(source.describe(),))
    replacing_one = overwrite and unfinished(partial)
    if resume and (path / MANIFEST).is_file() and not replacing_one:
        found = open_database(path)
        check_same(plan, found.manifest, path)
        return found
    check_place(path, resume=resume, overwrite=overwrite)
    make_folder(partial)
    with writing(partial):
        build = Build(partial, plan, source, encoder, workers=workers, progress=progress)
        plan = build.run(resume)
        if (partial / BUILD).is_file():
            plan.write(partial / BUILD)
            os.replace(partial / BUILD, partial / MANIFEST)
        reached("manifest written")
        move(partial, path)
    if plan.skipped:
        warnings.warn(skipped_message(plan.skipped), SkippedPictures, stacklevel=2)
    return open_database(path)


def skipped_message(skipped: Sequence[tuple[str, str]], most: int = 10) -> str:
    """One line that counts and names the pictures that were left out."""
    names = ", ".join(f"{name} ({reason})" for name, reason in skipped[:most])
    more = f" and {len(skipped) - most} more (see skipped in {MANIFEST})"
    return f"{len(skipped)} skipped: {names}{more if len(skipped) > most else ''}"


class Build:
    """The making of shards in a folder, from the first picture or from where it was left.

    Args:
        folder: where the shards and ``build.json``, the state of the work, are written.
        plan: the manifest to be, without shards.
        source: the pictures.
        encoder: what places them.
        workers: processes that decode ahead.
        progress: show a bar.
        first: number of the first shard, of its first row, and of the source.
    """

    def __init__(
        self,
        folder: Path,
        plan: Manifest,
        source: Source,
        encoder: Encoder,
        *,
        workers: int,
        progress: bool,
        first: tuple[int, int, int] = (0, 0, 0),
    ):
        self.folder, self.plan, self.source, self.encoder = folder, plan, source, encoder
        self.workers, self.progress = workers, progress
        self.first_shard, self.first_row, self.source_number = first

    def run(self, resume: bool) -> Manifest:
        """Does the work; the manifest with its shards."""
        if resume and (self.folder / MANIFEST).is_file():
            # Killed between the last shard and the move to its place: all the work is done.
            done = Manifest.read(self.folder / MANIFEST)
            check_same(self.plan, done, self.folder)
            return done
        if resume and (self.folder / BUILD).is_file():
            begun = Manifest.read(self.folder / BUILD)
            check_same(self.plan, begun, self.folder)
            self.plan = begun
            self._remove_strays()
        else:
            clear(self.folder)
            self.plan.write(self.folder / BUILD)
        try:
            return self._run()
        except ValueError:
            if not Manifest.read(self.folder / BUILD).shards:
                shutil.rmtree(self.folder)
            raise

    def _run(self) -> Manifest:
        if len(self.source) == 0:
            raise ValueError("the source holds no pictures: nothing to build a database from")
        settings = self.plan.settings
        buffer = ShardBuffer(settings["shard_rows"], self.encoder.dim)
        shards, skipped = list(self.plan.shards), list(self.plan.skipped)
        picture, first_row = shards[-1].next if shards else (0, 0)
        batch: list[Item] = []
        total = len(self.source)
        bar = progress_bar(total, "database", self.progress, initial=picture, unit="img")
        with bar:
            for i, read in self._pictures(picture):
                if isinstance(read, str):
                    skipped.append((self.source.name(i), read))
                    bar.update()
                    continue
                start = first_row if i == picture else 0
                for j, item in enumerate(read[start:], start + 1):
                    batch.append(item)
                    if len(batch) == min(settings["batch_size"], buffer.room):
                        self._encode(batch, buffer, self.first_row + sum(s.rows for s in shards))
                        batch = []
                    if buffer.room == 0:
                        at = (i, j) if j < len(read) else (i + 1, 0)
                        self._commit(buffer, shards, skipped, at)
                bar.update()
            if batch:
                self._encode(batch, buffer, self.first_row + sum(s.rows for s in shards))
            if buffer.count:
                self._commit(buffer, shards, skipped, (len(self.source), 0))
        if not shards:
            raise ValueError(f"no picture could be read; {skipped_message(skipped)}")
        return replace(self.plan, shards=tuple(shards), skipped=tuple(skipped))

    def _pictures(self, start: int) -> Iterator[tuple[int, list[Item] | str]]:
        pictures = _Pictures(self.source, start)
        if not self.workers:
            for i in range(len(pictures)):
                yield start + i, pictures[i]
            return
        from torch.utils.data import DataLoader

        loader = DataLoader(pictures, batch_size=None, num_workers=self.workers)
        yield from enumerate(loader, start)

    def _encode(self, batch: list[Item], buffer: ShardBuffer, before: int) -> None:
        first = before + buffer.count
        embeddings = encode_images(self.encoder, [item.image for item in batch]).cpu()
        if embeddings.shape != (len(batch), self.encoder.dim):
            raise ValueError(
                f"the encoder gave embeddings of shape {tuple(embeddings.shape)} for "
                f"{len(batch)} images, its dim={self.encoder.dim}"
            )

        def name(row: int) -> str:
            return f"{batch[row].record.get('file', 'image')} (row {first + row})"

        stored, norms = storable(embeddings, self.plan.fingerprint.encoder, name)
        side = self.plan.settings["thumbnails"]
        small = [thumbnail(item.image, side) for item in batch] if side else []
        buffer.add(stored, norms, [item.record for item in batch], small)

    def _commit(
        self,
        buffer: ShardBuffer,
        shards: list[Shard],
        skipped: list[tuple[str, str]],
        at: tuple[int, int],
    ) -> None:
        number = self.first_shard + len(shards)
        shards.append(buffer.write(self.folder, number, at, self.source_number))
        state = replace(self.plan, shards=tuple(shards), skipped=tuple(skipped))
        state.write(self.folder / BUILD)
        reached("shard recorded")

    def _remove_strays(self) -> None:
        known = {BUILD, *(name for shard in self.plan.shards for name in shard.files)}
        for file in self.folder.iterdir():
            if file.name not in known:
                file.unlink()


class _Pictures(torch.utils.data.Dataset[Any]):
    """Pictures from ``start`` on; the reason, where one cannot be read."""

    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, i: int) -> list[Item] | str:
        try:
            return self.source.read(self.start + i)
        except UnreadableImage as error:
            return str(error)


def encode_images(encoder: Encoder, images: Sequence[Tensor]) -> Tensor:
    """Images (c, h, w) of any sizes -> embeddings (b, d), each size in one call if need be."""
    floats = [to_float(image) for image in images]
    if len({image.shape for image in floats}) == 1:
        return encoder.encode_image(torch.stack(floats))
    prepare, encode = (getattr(encoder, n, None) for n in ("prepare", "encode_prepared"))
    if prepare is not None and encode is not None:
        return encode(torch.cat([prepare(image[None]) for image in floats]))
    out = torch.empty(len(floats), encoder.dim)
    for shape in dict.fromkeys(image.shape for image in floats):
        same = [i for i, image in enumerate(floats) if image.shape == shape]
        out[same] = encoder.encode_image(torch.stack([floats[i] for i in same])).float().cpu()
    return out


def check_same(plan: Manifest, begun: Manifest, path: Path) -> None:
    """Refuses to continue a build with another encoder, source or setting."""
    if (what := plan.fingerprint.disagreement(begun.fingerprint)) is not None:
        raise ValueError(f"{path} was begun with another encoder: {what}: start anew (--overwrite)")
    mine = plan.settings | plan.sources[0]
    theirs = begun.settings | begun.sources[0]
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
