"""Reads a PyTorch ``.ckpt`` without running what is in it and without loading what is not used.

A checkpoint is a zip of one pickle and of raw tensor bytes. The pickle may name any function of any
package and call it; here nothing is imported: tensors and plain containers are rebuilt, other
classes (trainer callbacks, configuration objects) become empty stand-ins, and a call to anything
else, or a change of it, is refused. The tensors are views of the memory-mapped file: what nobody
reads costs no memory.
"""

from __future__ import annotations

import math
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.disk.pickle_machine import MOST, PLAIN, PlainUnpickler, Rebuilt, Refused
from retrodiff.text import printable

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}

NAMES = 10_000
"""Different classes that a checkpoint may name."""

SPREAD = 1 << 24
"""Elements that a tensor may have beyond those of its data: expanded tensors repeat them."""

PACKAGES = frozenset(
    "argparse datetime enum ldm lightning lightning_fabric numpy omegaconf pathlib "
    "pytorch_lightning rdm taming torch torchmetrics typing".split()
)
"""Packages whose objects training leaves in a checkpoint. None of them is imported: where one of
their classes is called, the result is an empty stand-in."""

LOWER_CASE = {
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "device"),
}
"""The same for names that don't look like a class."""


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, its tensors memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or it would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: check the path of the checkpoint")
    try:
        return _Unpickler(_Archive(path)).load()
    except Refused as error:
        raise ValueError(f"{path}: {_refusal(str(error))}") from None
    except ValueError as error:
        line = _one_line(error)
        raise ValueError(line if str(path) in line else f"{path}: {line}") from error
    except Exception as error:  # damaged bytes can spell anything
        raise ValueError(
            f"{path} is damaged, its pickle cannot be read: {type(error).__name__}, "
            f"{_one_line(error)}"
        ) from error


class _Archive:
    """The zip: where each tensor's bytes are in the mapped file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = {entry.filename: entry for entry in archive.infolist()}
                pickles = [name for name in self.entries if name.endswith("data.pkl")]
                if len(pickles) != 1:
                    raise ValueError(f"{path} is a zip file, but not one that PyTorch wrote")
                size = self.entries[pickles[0]].file_size
                if size > MOST:
                    raise ValueError(f"{path} holds a pickle of {size:,} bytes: no checkpoint does")
                self.pickle = archive.read(pickles[0])
                self.prefix = pickles[0].removesuffix("data.pkl")
                order = f"{self.prefix}byteorder"
                if order in self.entries and archive.open(order).read(16) != b"little":
                    raise ValueError(
                        f"{path} was written on a big-endian machine: convert it there"
                    )
        except ValueError:
            raise
        except Exception as error:  # of the zip reader and its decompressor, many kinds
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated, or no checkpoint that "
                f"PyTorch 1.6 or newer wrote ({_one_line(error)}): fetch it again and compare its "
                "size"
            ) from error
        with path.open("rb") as file:
            # A private mapping: changing a tensor never changes the file.
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """The storage called ``key`` as a flat tensor."""
        entry = self.entries.get(f"{self.prefix}data/{key}")
        size = numel * dtype.itemsize
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < size:
            raise ValueError(
                f"{self.path} is damaged: tensor data {key!r} is missing or not {size} bytes long"
            )
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        # The lengths of name and extra field in the local header may differ from the directory's.
        start = entry.header_offset + 30
        if start <= len(self.mapped):
            start += sum(struct.unpack_from("<HH", self.mapped, start - 4))
        if start + size > len(self.mapped):
            raise ValueError(f"{self.path} is truncated: tensor data {key!r} ends behind its end")
        return torch.frombuffer(self.mapped, dtype=dtype, count=numel, offset=start)


class _Foreign(type):
    """A class that stands in for one we don't import. Calling it would be running code."""

    known: bool
    origin: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not cls.known:
            raise _refusal(cls.origin)
        return object.__new__(cls)


class _StandIn(Rebuilt):
    """An object of a class we don't import: it takes its state and forgets it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return object.__new__(cls)


class _Unpickler(PlainUnpickler):
    def __init__(self, archive: _Archive):
        super().__init__(archive.pickle)
        self.archive = archive
        self.classes: dict[str, _Foreign] = {}

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if (call := PLAIN.get((module, name)) or CALLS.get((module, name))) is not None:
            return self.call(origin, call)
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if origin not in self.classes:
            if len(self.classes) == NAMES:
                raise pickle.UnpicklingError(f"more than {NAMES:,} classes are named")
            known = module.split(".")[0] in PACKAGES and name[:1].isupper()
            known = known or (module, name) in LOWER_CASE
            made = _Foreign("StandIn", (_StandIn,), {"known": known, "origin": origin})
            self.classes[origin] = made
        return self.classes[origin]

    def persistent_load(self, pid: Any) -> Tensor:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as numel):
                return self.archive.tensor(key, dtype, numel)
            case _:
                raise pickle.UnpicklingError("tensor data described in an unknown way")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    shape, steps = [int(n) for n in size], [int(step) for step in stride]
    if not isinstance(storage, Tensor) or min(shape, default=1) < 0 or len(shape) > 64:
        raise ValueError("a tensor is described in an unknown way: damaged file")
    if 0 in shape:
        return storage.new_empty(0).view(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if offset < 0 or min(steps, default=0) < 0 or last >= storage.numel():
        raise ValueError(f"a tensor of shape {tuple(shape)} reaches out of its data: damaged file")
    if math.prod(shape) > storage.numel() + SPREAD:
        raise ValueError(f"a tensor of shape {tuple(shape)} repeats a few numbers: damaged file")
    return storage.as_strided(shape, steps, offset)


def _rebuild_typed(
    storage: Tensor,
    offset: int,
    size: tuple,
    stride: tuple,
    _: Any,
    hooks: Any,
    dtype: Any,
    *__: Any,
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor's data type is described in an unknown way: damaged file")
    whole = storage.numel() // dtype.itemsize * dtype.itemsize
    return _rebuild_tensor(storage[:whole].view(dtype), offset, size, stride)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


CALLS = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
"""Calls that are allowed, as functions of ours."""


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:500])


def _refusal(origin: str) -> ValueError:
    return ValueError(
        f"the checkpoint wants to call {printable(origin[:200])} while it is read: refused, "
        "nothing was run. A checkpoint of weights has no need to; don't use this file unless you "
        "know its maker, and then only after saving its tensors again as safetensors"
    )
