"""Checks SQL conditions before a database engine reads them: each is one whole condition.

Conditions are joined as ``(one) AND (other)``. One that closes a parenthesis that it did not open,
or leaves a quote or a comment open, would change what the others mean. Long and deep conditions end
the process in the engine's own parser, or keep it busy for ever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from retrodiff.text import printable

LONGEST = 2**20
"""Characters of a condition; long lists of constants are its only long part."""

DEEPEST = 16
"""Levels of parentheses."""

MOST = 1000
"""Names, keywords and operators of a condition."""

_TOKEN = re.compile(
    r"""(?P<literal>'(?:[^']|'')*'|\d[\w.]*|,|\s+)   # what a long list consists of
    |(?P<name>"(?:[^"]|"")*"|`[^`]*`|\w+)
    |(?P<bad>--|/\*|[;'"`\\$#\0])                     # comments, open quotes, escapes, an end
    |(?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_CLOSES = {")": "(", "]": "[", "}": "{"}


def joined(conditions: Sequence[str]) -> str | None:
    """All conditions as one; None where there are none.

    Raises:
        ValueError: one of them is not a condition by itself.
    """
    for condition in conditions:
        check_condition(condition)
    if len(conditions) < 2:
        return next(iter(conditions), None)
    return " AND ".join(f"({condition})" for condition in conditions)


def check_condition(text: str) -> None:
    """Refuses a condition that is not closed in itself, or too long or deep.

    Raises:
        ValueError: it is one.
    """
    if not isinstance(text, str):
        raise ValueError(f"a condition is SQL such as \"label = 'dog'\", not {text!r:.50}")
    if len(text) > LONGEST:
        raise _refusal(text, f"it has {len(text):,} characters, more than {LONGEST:,}")
    open_, count = list[str](), 0
    for token in _TOKEN.finditer(text):
        mark = token["mark"]
        if token["bad"]:
            raise _refusal(text, f"{token['bad']!r} is a comment, an open quote, or no SQL")
        count += token["literal"] is None
        if mark in ("(", "[", "{"):
            open_.append(mark)
        elif mark in _CLOSES and (not open_ or open_.pop() != _CLOSES[mark]):
            raise _refusal(text, f"{mark!r} closes what it does not open")
        if len(open_) > DEEPEST:
            raise _refusal(text, f"it is nested more than {DEEPEST} levels deep")
    if open_:
        raise _refusal(text, f"{open_[-1]!r} is not closed")
    if not count:
        raise _refusal(text, "it compares nothing")
    if count > MOST:
        raise _refusal(text, f"it has more than {MOST} names and operators: use IN (...)")


def _refusal(text: str, reason: str) -> ValueError:
    shown = text if len(text) <= 200 else text[:199] + "…"
    return ValueError(f"cannot use the filter {printable(repr(shown))}: {reason}")
