"""Checks whole numbers where they enter, so that a wrong one is refused by its name."""

from __future__ import annotations

import operator
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number as an ``int``; numpy's and torch's are taken too.

    Args:
        name: what the number is called where it was given.
        value: the number.
        least: the smallest one that makes sense.

    Raises:
        ValueError: it is no whole number, or less than ``least``.

    Example:
        >>> whole("batch_size", 8)
        8
    """
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number >= least:
                return number
    raise ValueError(f"{name}={value!r}: give a whole number, at least {least}")
