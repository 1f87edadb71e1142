"""Writes and reads the fingerprint of embeddings in the metadata of a table's schema."""

from __future__ import annotations

import json
from typing import Any

from retrodiff.disk.untrusted import LARGEST, parse_json
from retrodiff.interfaces import Fingerprint

MARK = b"retrodiff"
"""Key in the metadata of a schema."""


def marked(schema: Any, fingerprint: Fingerprint) -> Any:
    """A pyarrow schema that says whose embeddings the table holds."""
    return schema.with_metadata({MARK: json.dumps(vars(fingerprint)).encode()})


def mark_of(schema: Any, name: str) -> Fingerprint | None:
    """The fingerprint in the metadata of a pyarrow schema; None where there is none.

    Args:
        schema: of the table.
        name: what the table is called in errors.
    """
    about = (schema.metadata or {}).get(MARK)
    if about is None:
        return None
    try:
        return Fingerprint.from_json(parse_json(about[:LARGEST], "its fingerprint"))
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from None


def agreed(given: Fingerprint | None, written: Fingerprint | None, name: str) -> Fingerprint:
    """The fingerprint of a table's rows: the one that is given, or the table's own.

    Raises:
        ValueError: there is neither, or they are of different encoders.
    """
    mark = given or written
    if mark is None:
        raise ValueError(
            f"{name} does not say which encoder made its vectors: give "
            "fingerprint=encoder.fingerprint"
        )
    if written is not None and (what := mark.disagreement(written)) is not None:
        raise ValueError(f"fingerprint and {name.removeprefix('the ')} disagree: {what}")
    return mark
