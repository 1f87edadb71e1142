"""What ``generation.json`` says of sampled images: settings, prompts, and the neighbors of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retrodiff.interfaces import Record

FILE = "generation.json"

TEXT_MODES = ("text", "text+neighbors", "neighbors", "class")
"""Modes whose queries may be prompts."""


@dataclass(frozen=True)
class Sampled:
    """How images were sampled.

    Args:
        settings: as the sampling recorded them; empty: not known.
        files: names of the images, in order.
        sources: what each was asked with, such as its prompt.
        rows: rows of the database that conditioned each.
        records: where those rows come from.
        broken: names of images with NaN or infinities.
    """

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: tuple[str, ...] = ()
    sources: tuple[Any, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    records: tuple[tuple[Record, ...], ...] = ()
    broken: tuple[str, ...] = ()

    def of(self, files: Sequence[str]) -> Sampled:
        """The same of some images only, in the order of their names."""
        at = {file: i for i, file in enumerate(self.files)}
        chosen = [at[file] for file in files]

        def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in chosen)

        return replace(
            self,
            files=some(self.files),
            sources=some(self.sources),
            rows=some(self.rows),
            records=some(self.records),
        )

    @property
    def encoder(self) -> str | None:
        """Name of the encoder that conditions the model."""
        used = self.settings.get("database")
        return used.get("encoder") if isinstance(used, dict) else None

    @property
    def database_rows(self) -> str | None:
        """Hash of the rows of the database that was retrieved from."""
        used = self.settings.get("database")
        return used.get("rows") if isinstance(used, dict) else None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each image; empty where images were not asked for with prompts."""
        modes = self.settings.get("mode")
        modes = {modes} if isinstance(modes, str) else set(modes or ())
        texts = self.sources and all(isinstance(s, str) and s for s in self.sources)
        return self.sources if texts and modes and modes <= set(TEXT_MODES) else ()

    @property
    def conditions(self) -> str:
        """m, s, k, eta, steps and seed in one line, as far as they are known."""
        if not self.settings:
            return "sampling not recorded"
        told = {
            "m": _number("fraction", self.settings.get("proposal"))
            or ("all" if self.settings.get("proposal") else None),
            "s": _number("scale", self.settings.get("guidance"))
            or ("1" if self.settings.get("guidance") == "Unguided()" else None),
            "k": self.settings.get("k"),
            "eta": _number("eta", self.settings.get("sampler")),
            "steps": self.settings.get("steps"),
            "seed": self.settings.get("seed"),
        }
        return " ".join(f"{name}={'-' if value is None else value}" for name, value in told.items())


def read_sampled(folder: str | Path) -> Sampled:
    """What the ``generation.json`` of a folder says; nothing where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return Sampled()
    try:
        value = json.loads(file.read_text("utf-8"))
        rows = value["images"]
        settings = value["settings"] if isinstance(value["settings"], dict) else {}
        files = tuple(_plain(row["file"]) for row in rows)
        near = [[n for n in row["neighbors"] if int(n["row"]) >= 0] for row in rows]
        return Sampled(
            settings,
            files,
            tuple(row.get("source") for row in rows),
            tuple(tuple(int(n["row"]) for n in mine) for mine in near),
            tuple(tuple(dict(n["record"]) for n in mine) for mine in near),
            tuple(row["file"] for row in rows if row.get("finite") is False),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is damaged: delete it to evaluate the images alone") from None


def _plain(name: Any) -> str:
    """A file's name without any folder; others are refused."""
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(name)
    return name


def _number(name: str, text: Any) -> str | None:
    """The value of an argument in a component's repr, such as ``scale`` of its guidance."""
    found = re.search(rf"\b{name}=([-+.\deE]+)", str(text))
    return found and found[1]
