"""An unpickler restricted to the operations that plain data needs.

A pickle may name any function of any package and call it, or change any object that it names. Here
nothing is imported, and nothing that exists outside of the file is handed to it: names stand for
functions of ours, and only objects that the pickle itself has made can be changed. Python's own
unpickler, the one written in Python, does the rest: the one written in C reserves memory for what a
file merely claims.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import numpy as np

_COPIED = (bytes, bytearray, str, list, tuple, dict, set, frozenset)
"""What a call may copy; tensors of a checkpoint are views of its file, and cost nothing."""

MOST = 1 << 29
"""Bytes of the largest pickle that is read."""


class Refused(Exception):
    """A pickle asks for something that is neither a plain value nor part of an array."""


class Rebuilt:
    """An object that a pickle may hand a state to; it takes of it what it needs."""

    def rebuild(self, state: Any) -> None:
        """The state that the pickle holds for this object."""


class Ordered(OrderedDict[Any, Any], Rebuilt):
    """An ordered dictionary; attributes that a pickle wants to set on it are dropped."""


# --- calls ---------------------------------------------------------------------------------------


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    del encoding  # always latin1: how old pickle protocols spell bytes
    return text.encode("latin1")


def _defaultdict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    del factory
    return dict(_items(items))


def _number(kind: Callable[..., Any], *given: Any) -> Any:
    if not all(isinstance(value, (bool, int, float)) for value in given):
        raise pickle.UnpicklingError("a number is made of something else")
    return kind(*given)


def _items(items: Any) -> list[tuple[Any, Any]]:
    pairs = list(items.items() if isinstance(items, dict) else items)
    return [(hashable(key), value) for key, value in pairs]


def _filled(kind: Callable[[Any], Any], items: Any = (), encoding: str = "") -> Any:
    if encoding:
        return kind(_encoded(items))
    if not isinstance(items, (list, tuple, dict, set, frozenset, bytes)):
        raise pickle.UnpicklingError("a container is filled with something else")
    if kind in (set, frozenset):
        return kind([hashable(x) for x in cast("Iterable[Any]", items)])
    return kind(items)


def _mapping(kind: Callable[[Any], Any], items: Any = ()) -> Any:
    return kind(dict(_items(items)) if kind is Counter else _items(items))


PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): partial(_mapping, Ordered),
    ("collections", "defaultdict"): _defaultdict,
    ("collections", "Counter"): partial(_mapping, Counter),
    **{
        (module, kind.__name__): partial(call, kind)
        for module in ("builtins", "__builtin__")
        for call, kinds in (
            (_number, (bool, int, float, complex)),
            (_filled, (list, tuple, set, frozenset, bytes, bytearray)),
            (_mapping, (dict,)),
        )
        for kind in kinds
    },
}
"""Calls that a pickle of plain values makes, as functions of ours."""


def hashable(key: Any, depth: int = 2) -> Any:
    """The key itself, if it costs little to hash: tuples in tuples would exhaust the stack."""
    if isinstance(key, (tuple, frozenset)):
        parts = cast("tuple[Any, ...]", key)
        if depth == 0 or len(parts) > 16:
            raise pickle.UnpicklingError("a key is nested too deep, or too long")
        for part in parts:
            hashable(part, depth - 1)
    return key


class Call:
    """A function of ours, under the name that a pickle has for it.

    Every look-up makes a new one, so that nothing is shared with the rest of the program.
    """

    __slots__ = ("charge", "function", "name")

    def __init__(self, name: str, function: Callable[..., Any], charge: Callable[[Any], None]):
        self.name, self.function, self.charge = name, function, charge

    def __call__(self, *given: Any) -> Any:
        """The function's result; what it copies is counted."""
        self.charge(given)
        return self.function(*given)


# --- the machine ---------------------------------------------------------------------------------

_Machine: Any = pickle._Unpickler  # type: ignore[attr-defined]  # pyright: ignore

_KEPT = """
MARK STOP POP POP_MARK DUP FLOAT INT BININT BININT1 LONG BININT2 NONE STRING BINSTRING
SHORT_BINSTRING UNICODE BINUNICODE GLOBAL EMPTY_DICT GET BINGET LONG_BINGET LIST EMPTY_LIST PUT
BINPUT LONG_BINPUT TUPLE EMPTY_TUPLE BINFLOAT PROTO TUPLE1 TUPLE2 TUPLE3 NEWTRUE NEWFALSE LONG1
BINBYTES SHORT_BINBYTES SHORT_BINUNICODE BINUNICODE8 BINBYTES8 EMPTY_SET STACK_GLOBAL MEMOIZE FRAME
BINPERSID PERSID
""".split()
"""Operations as Python has them. Missing: INST and OBJ, which instantiate, EXT1 to EXT4, which look
up objects by number, and those that `PlainUnpickler` has in a stricter form."""


class _Operations(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"operation {code} is none that data needs")


class PlainUnpickler(_Machine):
    """Builds plain values; subclasses say which names a pickle may use.

    Args:
        data: the pickle.
    """

    dispatch = _Operations(
        {getattr(pickle, name)[0]: _Machine.dispatch[getattr(pickle, name)[0]] for name in _KEPT}
    )

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._left = 16 * len(data) + (1 << 26)
        self._size = len(data)

    def call(self, name: str, function: Callable[..., Any]) -> Call:
        """A function of ours for a name of the pickle's."""
        return Call(name, function, self._charge)

    def persistent_load(self, pid: Any) -> Any:
        """Refused: the data lies outside of the pickle."""
        raise pickle.UnpicklingError(f"refers to data outside of it, by a {type(pid).__name__}")

    def _charge(self, given: Any) -> None:
        """A few bytes can ask for the same large copy again and again; that has an end."""
        for value in given:
            self._left -= 8 + (8 * len(value) if isinstance(value, _COPIED) else 0)
            self._left -= value.nbytes if isinstance(value, np.ndarray) else 0
        if self._left < 0:
            raise pickle.UnpicklingError("copies more than the file holds, over and over")

    # The operations that change an object, or call one, as data needs them.

    def load_reduce(self) -> None:
        """Calls a function of ours."""
        given = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, (Call, type)):
            raise Refused(_called(function))
        self.append(function(*given))

    def load_newobj(self) -> None:
        """Makes an object of a class of ours."""
        given = self.stack.pop()
        self._made(self.stack.pop(), *given)

    def load_newobj_ex(self) -> None:
        """The same with named arguments."""
        named, given = self.stack.pop(), self.stack.pop()
        self._made(self.stack.pop(), *given, **named)

    def _made(self, kind: Any, *given: Any, **named: Any) -> None:
        if not isinstance(kind, type):
            raise Refused(_called(kind))
        self.append(kind.__new__(kind, *given, **named))

    def load_build(self) -> None:
        """Hands a state to an object of ours."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Rebuilt):
            raise Refused(f"a change of {_called(target)}")
        target.rebuild(state)

    def load_append(self) -> None:
        """One more item of a list."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """More items of a list."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, (list, bytearray)):
            target.extend(items)
        elif not isinstance(target, Rebuilt):
            raise Refused(f"a change of {_called(target)}")

    def load_setitem(self) -> None:
        """One more entry of a dictionary."""
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def load_setitems(self) -> None:
        """More entries of a dictionary."""
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        """A dictionary of what is on the stack."""
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[hashable(key) if type(key) is tuple else key] = value
        elif not isinstance(target, Rebuilt):
            raise Refused(f"a change of {_called(target)}")

    def load_additems(self) -> None:
        """More items of a set."""
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise Refused(f"a change of {_called(self.stack[-1])}")
        self.stack[-1].update(hashable(item) for item in items)

    def load_frozenset(self) -> None:
        """A frozen set of what is on the stack."""
        items = [hashable(item) for item in self.pop_mark()]
        self.append(frozenset(items))

    def load_bytearray8(self) -> None:
        """Bytes, after their number has been compared with what there is."""
        self.append(bytearray(self.read(self._counted(8))))

    def load_long4(self) -> None:
        """A whole number of at most a kilobyte."""
        size = self._counted(4)
        if size > 1024:
            raise pickle.UnpicklingError(f"a whole number of {size:,} bytes")
        self.append(pickle.decode_long(self.read(size)))

    def _counted(self, width: int) -> int:
        size = int.from_bytes(self.read(width), "little")
        if size > self._size:
            raise pickle.UnpicklingError(f"{size:,} bytes are claimed, more than there are")
        return size

    for _name in (
        "REDUCE NEWOBJ NEWOBJ_EX BUILD APPEND APPENDS SETITEM SETITEMS DICT ADDITEMS FROZENSET "
        "BYTEARRAY8 LONG4"
    ).split():
        dispatch[getattr(pickle, _name)[0]] = locals()[f"load_{_name.lower()}"]


def _called(target: Any) -> str:
    if isinstance(target, Call):
        return target.name
    kind = target if isinstance(target, type) else type(target)
    return f"a {kind.__name__}"
