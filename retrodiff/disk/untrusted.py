"""Reads JSON that a stranger may have made, and refuses files outside of a folder.

Whatever is wrong with them is one line of a ValueError.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, cast

from retrodiff.text import printable

LARGEST = 1 << 26
"""Bytes of the largest JSON file that is read, unless a reader says otherwise."""

DEEPEST = 64
"""Levels of lists and objects within each other."""


def read_json(file: Path, *, largest: int = LARGEST) -> Any:
    """The content of a JSON file: no name twice in an object, no NaN, no deep nesting.

    Args:
        file: read as UTF-8, with or without a byte order mark.
        largest: bytes of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, too large or nested too deep.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{printable(file)} is not a file")
    with file.open("rb") as opened:
        data = opened.read(largest + 1)
    if len(data) > largest:
        raise ValueError(
            f"{printable(file)} is larger than {largest / 2**20:g} MB, as no file of its kind is"
        )
    return parse_json(data, printable(file))


def parse_json(data: bytes | str, name: str) -> Any:
    """The same for bytes that have been read already.

    Args:
        data: the JSON.
        name: what it is called in errors.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
        _check(value)
        return value
    except RecursionError:
        raise ValueError(f"{name} is nested too deep: the file is damaged") from None
    except ValueError as error:
        raise ValueError(
            f"{name} is not valid JSON ({printable(str(error)[:200])}): the file is damaged"
        ) from None


def inside(folder: Path, name: str) -> Path:
    """A file of a folder, refused if its name or a link leads out of it.

    Links into the cache of the Hub's client are followed: that is how it keeps its files.

    Args:
        folder: may itself be a link.
        name: relative to it, with slashes.

    Raises:
        ValueError: it leads out of the folder.
    """
    parts = name.split("/")
    if not all(parts) or ".." in parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(
            f"the file {printable(name[:200])!r} does not lie in {printable(folder)}, which names "
            "it"
        )
    file, home = folder / name, folder.resolve()
    try:
        found = file.resolve()
    except (OSError, RuntimeError):  # links that lead to themselves
        raise ValueError(f"{printable(file)} is a link that leads nowhere") from None
    if not any(found.is_relative_to(place) for place in (home, *_stores(home))):
        raise ValueError(
            f"{printable(file)} is a link out of its folder, to {printable(found)}: put a copy of "
            "the file in its place"
        )
    return file


def _stores(home: Path) -> list[Path]:
    """Where the Hub's client keeps the files of a folder that it made."""
    levels = [home, *home.parents][:4]
    return [level.parent.parent / "blobs" for level in levels if level.parent.name == "snapshots"]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return made


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _check(value: Any, depth: int = DEEPEST) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, (list, dict)):
        if depth == 0:
            raise RecursionError
        parts = value.values() if isinstance(value, dict) else cast("list[Any]", value)
        for part in parts:
            if isinstance(part, (list, dict, float)):
                _check(part, depth - 1)
