"""Writes files of tensors (safetensors) whole and hashed, and opens only intact ones.

They are opened by the safetensors library, under its rules: the tensors lie one behind the other
without gaps, and the file ends where the last one does. A hashed file carries the SHA-256 of header
and data in its own header, so that a changed byte is found when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from retrodiff.disk.files import atomic_write
from retrodiff.disk.hashed import HASH, compared, was_compared
from retrodiff.text import printable

HEADER = 64 * 1024**2
"""Longest header in bytes that is read; a thousand tensors take about a tenth of a megabyte."""

BLANK = "0" * 64
"""What stands in the place of the hash while it is computed."""

AGAIN = "restore it, or make it again"

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Tensors(NamedTuple):
    """What a file holds.

    Args:
        tensors: by name, mapped and not read: pages come when they are touched.
        metadata: strings by name, without the hash.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# --- writing -------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a file, all at once, with a copy of one tensor in memory at a time.

    Args:
        path: of the file.
        tensors: on any device, in any layout.
        metadata: strings for the header.

    Returns:
        {"bytes": size, "sha256": hash of the file's bytes}, as `check_file` takes them.

    Raises:
        ValueError: a tensor's type has no name in such files.
    """
    with atomic_write(path) as partial, partial.open("wb") as file:
        digest = _write(file, tensors, metadata or {})
        return {"bytes": file.tell(), "sha256": digest}


def write_hashed_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file that carries its SHA-256; arguments and errors are those of `write_tensors`."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        digest = _write(file, tensors, {**(metadata or {}), HASH: BLANK})
        put_hash(file, digest)


def put_hash(file: BinaryIO, digest: str) -> None:
    """Puts the hash into the header of a file that was written with a blank one.

    Args:
        file: open for writing; its header must not hold `BLANK` before the hash.
        digest: SHA-256 of header (with `BLANK`) and data.
    """
    with open(file.name, "rb") as written:
        file.flush()
        first = read_header(written, Path(file.name))
    at = first.index(f'"{HASH}":"{BLANK}"'.encode()) + len(HASH) + 4
    file.seek(at)
    file.write(digest.encode())


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free to write
        for name in (None, *_order(layout)):
            piece = header(layout, metadata) if name is None else _bytes(tensors[name])
            hashed = beside.submit(digest.update, piece)
            file.write(piece)
            hashed.result()
    return digest.hexdigest()


def header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file: name -> type and shape of its tensors, and strings.

    The data follow in the order of `_order`, the widest types first, so that each is aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in _order(layout):
        dtype, shape = layout[name]
        if dtype not in _TYPES:
            raise ValueError(
                f"{name} is {dtype}, which such a file does not hold: convert it to one of "
                f"{', '.join(str(known).removeprefix('torch.') for known in _TYPES)}"
            )
        begin, end = end, end + _size(dtype, shape)
        about = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        entries[name] = about
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(layout: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def _size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


# --- reading -------------------------------------------------------------------------------------


def map_file(path: str | Path, *, again: str = AGAIN, hashed: bool | None = None) -> Tensors:
    """Opens a file; its tensors are mapped, and changes to them stay in memory.

    Args:
        path: of the file; no descriptor stays open.
        again: what to do about a damaged file, the end of the error.
        hashed: compare the hash, which reads the file once (see `check_hash`); True refuses a file
            without one, False compares none (of files that other programs wrote), None compares
            one that is there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no such file.
    """
    path = Path(path)
    with opened(path, again) as file:
        metadata = file.metadata() or {}
        tensors = {name: _tensor(file, name, path, again) for name in file.keys()}
    if hashed or (hashed is None and HASH in metadata):
        check_hash(path, again)
    return Tensors(tensors, {name: text for name, text in metadata.items() if name != HASH})


def map_tensors(
    path: str | Path, *, again: str = AGAIN, hashed: bool | None = None
) -> dict[str, Tensor]:
    """The tensors of `map_file` alone."""
    return map_file(path, again=again, hashed=hashed).tensors


@contextmanager
def opened(path: str | Path, again: str = AGAIN) -> Iterator[Any]:
    """A file opened by ``safetensors.safe_open`` once its size and its header fit each other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no such file; also what is raised while it is read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_length(path, again)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError, OverflowError, UnicodeError) as error:
        reason = " ".join(str(error).split())[:300]
        if "not fully covered" in reason or "MetadataIncompleteBuffer" in reason:
            reason = "truncated, or longer than its header says"
        raise _damaged(path, reason, again) from None


def check_hash(path: Path, again: str = AGAIN) -> None:
    """Compares a file with its hash; the same state of a file is read for that once per process.

    Raises:
        ValueError: it has none, or another byte than was written.
    """
    with path.open("rb") as file:
        first = read_header(file, path, again)
        metadata = _metadata(first, path, again)
        written = metadata.get(HASH)
        if not isinstance(written, str) or len(written) != len(BLANK):
            raise _damaged(path, "it carries no SHA-256 of itself", again)
        if was_compared(path, written):
            return
        digest = hashlib.sha256(first.replace(written.encode(), BLANK.encode(), 1))
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != written:
        raise _damaged(path, "it is not as it was written, its SHA-256 differs", again)
    compared(path, written)


def read_header(file: BinaryIO, path: Path, again: str = AGAIN) -> bytes:
    """The header of an open file, with the eight bytes of its length; what follows is the data."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER, size - 8):
        raise _damaged(path, f"{size} bytes cannot hold the header that it claims", again)
    return start + file.read(length)


def _tensor(file: Any, name: str, path: Path, again: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except OSError:
        raise
    except Exception as error:  # of the library or of torch, for types that it does not have
        raise _damaged(path, " ".join(str(error).split())[:300], again) from None


def _check_length(path: Path, again: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{printable(path)} is missing: {again}")
    if not path.is_file():
        raise ValueError(f"{printable(path)} is not a file: {again}")
    with path.open("rb") as file:
        read_header(file, path, again)


def _metadata(first: bytes, path: Path, again: str) -> dict[str, Any]:
    try:
        value = json.loads(first[8:])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _damaged(path: Path, reason: str, again: str) -> ValueError:
    return ValueError(
        f"{printable(path)} is damaged or no file of tensors ({printable(reason)}): {again}"
    )
