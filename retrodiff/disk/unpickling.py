"""Reads a pickle of plain containers, numbers and numpy arrays without running what is in it.

Arrays are rebuilt by functions of ours from their bytes, and everything else that is called or
changed is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from retrodiff.disk.pickle_machine import MOST, PLAIN, PlainUnpickler, Rebuilt, Refused
from retrodiff.text import printable

DEEPEST = 64
"""Levels of containers within containers."""


def read_plain_pickle(file: BinaryIO, name: str) -> Any:
    """The content of a pickle; what was a numpy array has to be passed through `numpy.asarray`.

    Args:
        file: open for reading.
        name: what it is called in errors.

    Raises:
        ValueError: it is damaged, larger than 512 MB, or would run code.
    """
    data = file.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"{name} is a pickle of more than {MOST >> 20} MB: save it as arrays")
    try:
        content = _Plain(data).load()
        _expanded(content, 4 * len(data) + (1 << 20))
        return content
    except Refused as error:
        raise ValueError(
            f"{name} wants to call {error} while it is read: refused, nothing was run. Data has "
            "no need to; don't use this file unless you know its maker"
        ) from None
    except Exception as error:  # damaged bytes can spell anything
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise ValueError(f"{name} is damaged, or no pickle: {reason}") from None


def _expanded(content: Any, most: int) -> None:
    """Refuses containers that hold each other so often that a reader of them would never end."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        known = sizes.get(id(value))
        if known is not None:
            return known
        if depth == 0:
            raise pickle.UnpicklingError(f"containers are nested deeper than {DEEPEST} levels")
        parts: Any = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(value, Array):
            parts = value.values.tolist() if value.values.dtype.hasobject else ()
        total = 1 + len(parts)
        for part in parts:
            if isinstance(part, (list, tuple, dict, set, frozenset, Array)):
                total += size(part, depth - 1)
        if total > most:
            raise pickle.UnpicklingError("a few containers hold each other over and over")
        if not isinstance(value, Array):
            sizes[id(value)] = total
        return total

    if isinstance(content, (list, tuple, dict, set, frozenset, Array)):
        size(content, DEEPEST)


class _Plain(PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if (module, name) in PLAIN:
            return self.call(origin, PLAIN[module, name])
        if (module, name) in (("numpy", "dtype"), ("numpy", "ndarray")):
            return self.call(origin, {"dtype": Kind, "ndarray": Array}[name])
        if re.fullmatch(r"numpy\._?core\.(multiarray|numeric)", module) and name in _NUMPY:
            return self.call(origin, _NUMPY[name])
        raise Refused(printable(origin[:200]))


class Kind(Rebuilt):
    """A numpy data type of numbers, text or objects."""

    def __init__(self, text: Any, *_: Any):
        if not isinstance(text, str) or not re.fullmatch(
            r"[<>|=]?([?bBiufcSUM]\d{0,9}|O\d?)", text
        ):
            raise pickle.UnpicklingError("a data type that is neither of numbers nor of text")
        self.dtype = np.dtype(object if "O" in text else text)

    def rebuild(self, state: Any) -> None:
        """The byte order."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array(Rebuilt):
    """A numpy array that is being rebuilt."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray = np.empty(0)

    def rebuild(self, state: Any) -> None:
        """Shape, type, order and bytes."""
        _, shape, kind, fortran, data = state
        self.values = _array(data, kind, shape, "F" if fortran else "C").values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)


def _array(data: Any, kind: Kind, shape: Any, order: Any = "C") -> Array:
    if isinstance(data, list):
        flat = np.empty(len(data), object)
        for i, value in enumerate(data):
            flat[i] = value
    elif kind.dtype.hasobject:
        raise pickle.UnpicklingError("an array of objects without objects")
    else:
        flat = np.frombuffer(data, kind.dtype)
    made = Array()
    made.values = flat.reshape(shape, order=order)
    return made


def _scalar(kind: Kind, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype)[0].item()


_NUMPY: dict[str, Callable[..., Any]] = {
    "_reconstruct": Array,
    "scalar": _scalar,
    "_frombuffer": _array,
}
