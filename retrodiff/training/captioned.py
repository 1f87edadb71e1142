"""Pictures with their captions: from files beside them, from a table, or from a column.

What has no caption cannot be learned from; it is left out, counted and named in one warning.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.build.ingest import skipped_message
from retrodiff.databases.sources.folders import ImageFolder, Source
from retrodiff.databases.sources.formats import open_source
from retrodiff.numbers import whole
from retrodiff.pictures.converting import to_bytes
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.progress import progress_bar
from retrodiff.text import escaped, printable
from retrodiff.training.folder_images import squared

FILE_COLUMNS = ("file", "file_name", "image", "path")
"""Columns of a table that may name the picture."""

TEXT_COLUMNS = ("caption", "text", "title")
"""Columns of a table that may hold the caption."""

NO_PICTURES = (".txt", ".csv", ".jsonl", ".json")
"""Endings of files that lie beside pictures and are not missed."""

CaptionOf = Callable[[str, Mapping[str, Any]], list[str]]
"""A picture's name and record -> its captions."""


@dataclass(frozen=True, eq=False)
class Captioned:
    """Pictures and captions in memory.

    Args:
        images: (n, 3, size, size), bytes: the central squares.
        captions: one or more texts for each.
        names: of the pictures, as their source has them.
        numbers: of the pictures in their source.
        count: pictures that the source has, with or without captions.
    """

    images: Tensor
    captions: list[list[str]]
    names: list[str]
    numbers: list[int]
    count: int

    def __len__(self) -> int:
        return len(self.images)


def read_captioned(
    source: Source | str | Path, captions: Sequence[str], size: int, *, progress: bool = True
) -> Captioned:
    """Reads pictures and their captions.

    Args:
        source: folder, parquet files, tars, zips: what `retrodiff.databases.open_source` takes.
        captions: where captions are, one or several places: ``txt``: a file beside each picture
            with the same name and this ending, a caption in each line; a file that ends in
            ``.csv`` or ``.jsonl``: a table with a column ``file`` (or ``file_name``) and a column
            ``caption`` (or ``text``), several rows for a picture where it has several captions;
            anything else: the name of a column, such as ``title`` in a parquet file.
        size: side of the squares.
        progress: show a bar.

    Raises:
        ValueError: no picture has a caption, or a table lacks a column.
    """
    size = whole("size", size)
    if isinstance(source, (str, Path)):
        source = open_source(source)
    if not captions:
        raise ValueError("no place of captions is given: txt, a table, or the name of a column")
    places = [_place(source, place) for place in captions]
    images: list[Tensor] = []
    texts: list[list[str]] = []
    numbers: list[int] = []
    without: list[str] = []
    skipped: list[tuple[str, str]] = []
    with progress_bar(len(source), "reading", progress) as bar:
        for i in range(len(source)):
            bar.update()
            name = source.name(i)
            if name.lower().endswith(NO_PICTURES):
                continue
            try:
                (item,) = source.read(i)
                image = to_bytes(squared(item.image, size)).expand(3, -1, -1)
            except UnreadableImage as error:
                skipped.append((name, str(error)))
                continue
            found = [text for place in places for text in place(name, item.record)]
            if not found:
                without.append(name)
                continue
            images.append(image)
            texts.append(list(dict.fromkeys(found)))
            numbers.append(i)
    if not images and not without:
        raise ValueError(f"the source holds no readable image: {skipped_message(skipped)}")
    if not images:
        raise ValueError(
            f"none of {len(without)} pictures has a caption in {' or '.join(captions)}, "
            f"{printable(without[0])} for example"
        )
    if skipped:
        warnings.warn(skipped_message(skipped), stacklevel=2)
    if without:
        named = ", ".join(printable(name) for name in without[:3])
        more = ", ..." if len(without) > 3 else ""
        warnings.warn(
            f"{len(without)} of {len(images) + len(without)} pictures have no caption and are left "
            f"out: {named}{more}",
            stacklevel=2,
        )
    names = [source.name(i) for i in numbers]
    return Captioned(torch.stack(images), texts, names, numbers, len(source))


def _place(source: Source, place: str) -> CaptionOf:
    """How captions are found at one place."""
    if place == "txt":
        if not isinstance(source, ImageFolder):
            raise ValueError(
                "captions 'txt' lie beside pictures in a folder: name a column instead"
            )
        home = source.path
        return lambda name, record: _beside(home / str(record["file"]))
    if place.lower().endswith((".csv", ".jsonl")):
        table = _table(Path(place).expanduser())
        return lambda name, record: table.get(name, [])

    def of_column(name: str, record: Mapping[str, Any]) -> list[str]:
        if place not in record:
            known = ", ".join(record) or "none"
            raise ValueError(
                f"{printable(name)} has no column {place!r} with captions; columns: {known}"
            )
        value = record[place]
        return [" ".join(value.split())] if isinstance(value, str) and value.strip() else []

    return of_column


def _beside(picture: Path) -> list[str]:
    try:
        text = picture.with_suffix(".txt").read_text(encoding="utf-8", errors="strict")
    except (FileNotFoundError, IsADirectoryError):
        return []
    except UnicodeDecodeError:
        raise ValueError(f"{picture.with_suffix('.txt')} is no UTF-8 text: convert it") from None
    return [plain for line in text.splitlines() if (plain := " ".join(line.split()))]


def _table(file: Path) -> dict[str, list[str]]:
    """A table's captions by the name of the picture."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(file), 1):
        name = next((row[c] for c in FILE_COLUMNS if c in row), None)
        text = next((row[c] for c in TEXT_COLUMNS if c in row), None)
        if name is None or (text is None and not any(c in row for c in TEXT_COLUMNS)):
            lacks = FILE_COLUMNS if name is None else TEXT_COLUMNS
            raise ValueError(
                f"{file}, row {number}: none of the columns {', '.join(lacks)}; it has "
                f"{printable(', '.join(map(str, row)))}"
            )
        if isinstance(text, str) and (plain := " ".join(text.split())):
            found.setdefault(escaped(str(name)).removeprefix("./"), []).append(plain)
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a table of captions")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix.lower() == ".csv":
                return list(csv.DictReader(opened))
            rows = [json.loads(line) for line in opened if line.strip()]
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is no table of captions: {reason}") from None
    if odd := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"{file} holds a line that is no object: {printable(repr(odd))[:80]}")
    return rows
