"""A tensor computed batch by batch: in memory, or in a file that grows and is mapped when whole.

The file is safetensors. Until it is whole it lies at ``PATH.partial``, which at any moment is a
prefix of the bytes to be: a process that is killed leaves its finished batches behind, and the next
one goes on after them. Batches begin where the row numbers say, so the bytes come out the same.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.files import make_folder
from retrodiff.locks import writing
from retrodiff.progress import progress_bar

FORMAT = 1
NAME = "rows"
"""Of the one tensor in the file."""

_DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}


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
        dtype: int32, int64 or float32.
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
    header = _header(shape, dtype, {**(about or {}), "format": FORMAT, "batch_size": batch_size})
    partial = path.with_name(path.name + ".partial")
    if path.exists() and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{path} exists: use it (resume=True), replace it (overwrite=True), or choose "
                "another path"
            )
        _check_same(path, _read_header(path), header)
        return map_table(path)[0]
    if partial.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{partial} is unfinished: continue it (resume=True) or start anew (overwrite=True)"
        )
    make_folder(path.parent)
    with partial.open("ab") as file, writing(partial):
        width = math.prod(shape[1:]) * dtype.itemsize
        begun = _rows_in(partial, header, width) if resume else None
        whole = (begun or 0) if begun == shape[0] else (begun or 0) // batch_size * batch_size
        file.truncate(0 if begun is None else len(header) + whole * width)
        if begun is None:
            file.write(header)
        for rows in batches(whole):
            file.write(rows.numpy().data)
            file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    return map_table(path)[0]


def map_table(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The tensor of a whole file, mapped and not read, and what its header says about it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != str(FORMAT):
                raise ValueError(
                    f"{path} has format {about.get('format')}, but this version reads tables of "
                    f"format {FORMAT}"
                )
            return file.get_tensor(NAME), about
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole table ({error}): make it again") from None


def _header(shape: tuple[int, ...], dtype: torch.dtype, about: Mapping[str, object]) -> bytes:
    """The first bytes of a safetensors file that holds one tensor."""
    size = math.prod(shape) * dtype.itemsize
    tensor = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    metadata = {name: str(value) for name, value in about.items()}
    text = json.dumps({"__metadata__": metadata, NAME: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> bytes | None:
    """The header of a file; None where it was cut off."""
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    whole = len(length) == 8 and len(text) == int.from_bytes(length, "little")
    return length + text if whole else None


def _rows_in(partial: Path, header: bytes, width: int) -> int | None:
    """Whole rows in a file that was begun with the same header; None if not even that is whole."""
    found = _read_header(partial)
    if found is None:
        return None
    _check_same(partial, found, header)
    return (partial.stat().st_size - len(header)) // width


def _check_same(path: Path, found: bytes | None, wanted: bytes) -> None:
    """Refuses a file that was made from something else, and says from what."""
    if found == wanted:
        return
    theirs, mine = (_facts(header) for header in (found, wanted))
    name = next((n for n in mine if mine[n] != theirs.get(n)), "header")
    raise ValueError(
        f"{path} was made with {name}={theirs.get(name)!r}, now {name}={mine.get(name)!r}: give "
        "the same, choose another path, or start anew (overwrite=True)"
    )


def _facts(header: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads((header or b"")[8:])
        return {**value["__metadata__"], "shape": value[NAME]["shape"]}
    except (ValueError, KeyError, TypeError):
        return {}
