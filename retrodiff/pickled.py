"""Reads a pickle of plain containers, numbers and numpy arrays without running what is in it.

A pickle may name any function of any package and call it. Here nothing is imported: arrays are
rebuilt by functions of ours from their bytes, and everything else that is called is refused.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np


def _encoded(text: str, encoding: str) -> bytes:
    del encoding  # always latin1: how old pickle protocols spell bytes
    return text.encode("latin1")


PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("collections", "Counter"): Counter,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (bool, int, float, complex, str, list, tuple, dict, set, frozenset)
    },
}
"""Classes that are rebuilt as they are, and bytes."""

READING = (
    pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError,
    OverflowError, TypeError, UnicodeError,
)  # fmt: skip
"""What Python's unpickler raises on damaged bytes."""


def read_plain_pickle(file: BinaryIO, name: str) -> Any:
    """The content of a pickle; what was a numpy array has to be passed through `numpy.asarray`.

    Args:
        file: open for reading.
        name: what it is called in errors.

    Raises:
        ValueError: it is damaged, or would run code.
    """
    try:
        return _Plain(file).load()
    except Refused as error:
        raise ValueError(
            f"{name} wants to call {error} while it is read: refused, nothing was run. Data has "
            "no need to; don't use this file unless you know its maker"
        ) from None
    except (*READING, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is damaged, or no pickle: {reason}") from None


class Refused(Exception):
    """A pickle asked for something that is neither a plain class nor part of an array."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if (module, name) in (("numpy", "dtype"), ("numpy", "ndarray")):
            return {"dtype": _Kind, "ndarray": _Array}[name]
        if re.fullmatch(r"numpy\._?core\.(multiarray|numeric)", module) and name in _NUMPY:
            return _NUMPY[name]
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"refers to data outside of it: {pid!r:.80}")


class _Kind:
    """A numpy data type of numbers, text or objects."""

    def __init__(self, text: str, *_: Any):
        if not re.fullmatch(r"[<>|=]?([?bBiufcSUM]\d*|O\d?)", text):
            raise pickle.UnpicklingError(f"data type {text!r:.20}")
        self.dtype = np.dtype(object if "O" in text else text)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array that is being rebuilt."""

    def __init__(self) -> None:
        self.values: np.ndarray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.values = _array(data, kind, shape, "F" if fortran else "C").values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)


def _array(data: Any, kind: _Kind, shape: Any, order: Any = "C") -> _Array:
    if isinstance(data, list):
        flat = np.empty(len(data), object)
        for i, value in enumerate(data):
            flat[i] = value
    else:
        flat = np.frombuffer(data, kind.dtype)
    made = _Array()
    made.values = flat.reshape(shape, order=order)
    return made


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Kind, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype)[0].item()


_NUMPY = {"_reconstruct": _reconstruct, "scalar": _scalar, "_frombuffer": _array}
