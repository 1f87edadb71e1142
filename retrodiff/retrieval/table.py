"""A tensor computed batch by batch: in memory, or in a file that grows and is mapped when whole.

The file is safetensors, with the SHA-256 of its bytes in its header. Until it is whole it lies at
``PATH.partial``, and ``PATH.batches.partial`` holds the hash of all that came before the end of
each batch. A process that is killed leaves both behind; the next one goes on after the last batch
that is as it was written. Batches begin where the row numbers say, so the bytes come out the same.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.disk.files import make_folder, room_for, sync_folder
from retrodiff.disk.hashed import HASH
from retrodiff.disk.locks import write_lock
from retrodiff.disk.tensors import BLANK, Tensors, header, map_file, put_hash, read_header
from retrodiff.progress import progress_bar

FORMAT = 1
NAME = "rows"
"""Of the one tensor in the file."""

AGAIN = "make it again"


def tabulated(
    compute: Callable[[int, int], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    batch_size: int,
    what: str,
    progress: bool,
    path: Path | None = None,
    about: Mapping[str, object] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """The tensor of ``shape`` whose rows from start to stop are ``compute(start, stop)``.

    Args:
        compute: start and stop, at most ``batch_size`` apart -> those rows.
        shape: of the whole.
        dtype: int32, int64, float32, float16 or bfloat16.
        batch_size: rows at a time.
        what: name of the progress bar.
        progress: show it.
        path: file to be written, then mapped; None: memory.
        about: what the rows depend on, kept in the file's header and compared.
        resume: continue a file that was begun; a whole one is opened.
        overwrite: replace what is there.

    Raises:
        ValueError: the file that is there was made from something else.
        FileExistsError: a file is there, and neither resume nor overwrite was asked for.
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size}, but at least one row must be computed at a time"
        )

    def batches(first: int) -> Iterator[Tensor]:
        with progress_bar(shape[0], what, progress, initial=first) as bar:
            for start in range(first, shape[0], batch_size):
                stop = min(start + batch_size, shape[0])
                rows = compute(start, stop).detach().cpu().to(dtype)
                if tuple(rows.shape) != (stop - start, *shape[1:]):
                    raise ValueError(
                        f"{what} of rows {start} to {stop} have shape {tuple(rows.shape)}, "
                        f"expected {(stop - start, *shape[1:])}"
                    )
                yield rows.contiguous()
                bar.update(stop - start)

    if path is None:
        table = torch.empty(shape, dtype=dtype)
        for i, rows in enumerate(batches(0)):
            table[i * batch_size : i * batch_size + len(rows)] = rows
        return table
    layout = {NAME: (dtype, shape)}
    metadata = {**(about or {}), "format": FORMAT, "batch_size": batch_size, HASH: BLANK}
    begin = header(layout, {name: str(value) for name, value in metadata.items()})
    if path.exists() and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{path} exists: use it (resume=True), replace it (overwrite=True), or choose "
                "another path"
            )
        whole = map_file(path, again=AGAIN)
        _check_same(path, _facts_of(whole), _facts(begin))
        return whole.tensors[NAME]
    begun = Unfinished(path, begin, shape[0], batch_size, math.prod(shape[1:]) * dtype.itemsize)
    if begun.partial.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{begun.partial} is unfinished: continue it (resume=True) or start anew "
            "(overwrite=True)"
        )
    make_folder(path.parent)
    way_out = "make room, then continue (resume=True)"
    with write_lock(begun.partial, make=Path.touch), room_for(path.parent, way_out):
        begun.finish(batches, resume)
    return map_table(path)[0]


def map_table(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The tensor of a whole file, mapped, and what its header says about it.

    Every byte is compared with the hash in the header, once per process.
    """
    found = map_file(path, again=AGAIN)
    if found.metadata.get("format") != str(FORMAT):
        raise ValueError(
            f"{path} has format {found.metadata.get('format')!r:.40}, but this version reads "
            f"tables of format {FORMAT}: {AGAIN}"
        )
    if found.tensors.keys() != {NAME} or found.tensors[NAME].ndim < 2:
        raise ValueError(f"{path} is no table: {AGAIN}")
    return found.tensors[NAME], found.metadata


class Unfinished:
    """The file of a table that is being made, and the hashes of its batches.

    Args:
        path: of the file to be.
        begin: its header, with a blank hash.
        rows: of the table.
        batch_size: rows per batch.
        width: bytes of a row.
    """

    def __init__(self, path: Path, begin: bytes, rows: int, batch_size: int, width: int):
        self.path, self.begin, self.rows = path, begin, rows
        self.batch_size, self.width = batch_size, width
        self.partial = path.with_name(path.name + ".partial")
        self.log = path.with_name(path.name + ".batches.partial")

    def finish(self, batches: Callable[[int], Iterator[Tensor]], resume: bool) -> None:
        """Writes the batches from a row on that are missing, and gives the file its name."""
        self.log.touch()
        with self.partial.open("r+b") as file, self.log.open("r+b") as log:
            digest, hashes = hashlib.sha256(self.begin), list[bytes]()
            if resume and self._is_ours(file):
                digest, hashes = self._intact(file, log.read().splitlines())
            done = min(len(hashes) * self.batch_size, self.rows)
            log.seek(0)
            log.truncate()
            log.write(b"".join(line + b"\n" for line in hashes))
            file.seek(0)
            file.write(self.begin)
            file.seek(len(self.begin) + done * self.width)
            file.truncate()
            for rows in batches(done):
                piece = rows.reshape(-1).view(torch.uint8).numpy().data
                file.write(piece)
                file.flush()
                digest.update(piece)
                log.write(digest.hexdigest().encode() + b"\n")
                log.flush()
            put_hash(file, digest.hexdigest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        self.log.unlink(missing_ok=True)

    def _is_ours(self, file: Any) -> bool:
        """Whether a file was begun with the same header; what was made otherwise is refused."""
        if self.begin.startswith(file.read(len(self.begin))):
            return True
        file.seek(0)
        try:
            found = read_header(file, self.partial, AGAIN)
        except ValueError:
            found = b""
        if not (facts := _facts(found)):
            raise ValueError(
                f"{self.partial} is damaged, or no unfinished table: start anew (overwrite=True)"
            )
        _check_same(self.partial, facts, _facts(self.begin))
        return len(found) == len(self.begin)

    def _intact(self, file: Any, lines: Sequence[bytes]) -> tuple[Any, list[bytes]]:
        """Hash after the last batch that is as it was written, and the hashes up to it."""
        digest, hashes = hashlib.sha256(self.begin), list[bytes]()
        file.seek(len(self.begin))
        for number, line in enumerate(lines):
            rows = min(self.batch_size, self.rows - number * self.batch_size)
            piece = file.read(max(0, rows) * self.width)
            ahead = digest.copy()
            ahead.update(piece)
            if rows <= 0 or line != ahead.hexdigest().encode():
                warnings.warn(
                    f"{self.partial} is not as it was written: rows from "
                    f"{number * self.batch_size} on are computed again",
                    stacklevel=6,
                )
                break
            digest = ahead
            hashes.append(line)
        return digest, hashes


def _facts_of(found: Tensors) -> dict[str, Any]:
    table = found.tensors.get(NAME)
    shape = None if table is None else list(table.shape)
    return {**found.metadata, "shape": shape}


def _facts(begin: bytes) -> dict[str, Any]:
    """What a header says that a table was made from; nothing if it is none."""
    try:
        value = json.loads(begin[8:])
        facts = {**value["__metadata__"], "shape": value[NAME]["shape"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: fact for name, fact in facts.items() if name != HASH}


def _check_same(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuses a file that was made from something else, and says from what."""
    for name in mine:
        if mine[name] != theirs.get(name):
            raise ValueError(
                f"{path} was made with {name}={theirs.get(name)!r:.200}, now "
                f"{name}={mine[name]!r:.200}: give the same, choose another path, or start anew "
                "(overwrite=True)"
            )
