"""Counts and names the pictures that were left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from retrodiff.databases.manifest import MANIFEST
from retrodiff.text import printable

Skipped = tuple[str, str]
"""Name and reason."""


class SkippedPictures(UserWarning):
    """Some pictures could not be read and are not in the database."""


def warn_of(skipped: Sequence[Skipped]) -> None:
    """One warning for all pictures that were left out; none if there are none."""
    if skipped:
        warnings.warn(skipped_message(skipped), SkippedPictures, stacklevel=3)


def skipped_message(skipped: Sequence[Skipped], most: int = 10) -> str:
    """One line that counts and names the pictures that were left out."""
    more = f" and {len(skipped) - most} more (see skipped in {MANIFEST})"
    return f"{len(skipped)} skipped: {_named(skipped, most)}{more * (len(skipped) > most)}"


def warn_of_unused(where: object, unused: Sequence[Skipped], most: int = 10) -> None:
    """One warning for what looks like pictures and does not belong to a source."""
    if unused:
        more = f" and {len(unused) - most} more" * (len(unused) > most)
        names = _named(unused, most)
        text = f"{printable(where)}: {len(unused)} pictures not taken: {names}{more}"
        warnings.warn(text, SkippedPictures, stacklevel=4)


def _named(skipped: Sequence[Skipped], most: int) -> str:
    return ", ".join(f"{printable(name)} ({printable(why)})" for name, why in skipped[:most])
