"""Checks numbers where they enter, so that a wrong one is refused by its name."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

LARGEST_SEED = 2**64 - 1


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number as an ``int``; numpy's and torch's are taken too.

    Args:
        name: what the number is called where it was given.
        value: the number.
        least: the smallest one that makes sense.
        most: the largest; None: there is none.

    Raises:
        ValueError: it is no whole number, or out of range.

    Examples:
        >>> whole("batch_size", 8)
        8
    """
    if not _is_bool(value):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number >= least and (most is None or number <= most):
                return number
    limits = f"at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name}={_shown(value)}: give a whole number, {limits}")


def real(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """A number as a ``float``; numpy's and torch's are taken too.

    Args:
        name: what the number is called where it was given.
        value: the number.
        least: the smallest one that makes sense.
        most: the largest.
        above: it must be larger than this.
        below: it must be smaller than this.
        infinite: whether infinities are numbers, too; NaN never is.

    Raises:
        ValueError: it is no number, not finite, or out of range.

    Examples:
        >>> real("eta", 0.5, 0, 1)
        0.5
    """
    if not _is_bool(value) and is_real(value):
        number = float(value)
        possible = math.isfinite(number) or (infinite and not math.isnan(number))
        inside = least <= number <= most
        inside = inside and (number > above or above == -math.inf)
        inside = inside and (number < below or below == math.inf)
        if possible and inside:
            return number
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("at least", least),
            ("above", above),
            ("at most", most),
            ("below", below),
        )
        if math.isfinite(limit)
    ]
    wanted = "a number" if infinite else "a finite number"
    raise ValueError(f"{name}={_shown(value)}: give {', '.join([wanted, *limits])}")


def is_real(value: Any) -> bool:
    """Whether a value is one real number: of Python, numpy, or a tensor without axes."""
    if isinstance(value, numbers.Real):
        return True
    single = hasattr(value, "dtype") and getattr(value, "ndim", None) == 0
    return single and isinstance(value.item(), (int, float))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
