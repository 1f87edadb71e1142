"""Opens a model and databases for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrodiff.databases import Searchable, open_database
from retrodiff.demo.pictograms import STYLES, held_out
from retrodiff.disk.shipped import SHIPPED
from retrodiff.model import Model
from retrodiff.retrieval import Uniform
from retrodiff.ui.shelves import Shelf, Shelves
from retrodiff.ui.studio import Studio

PICTOGRAMS = "pictograms"
UNSEEN = "Concepts never trained on"

EXAMPLES = (
    "smiling face",
    "cat face",
    "clock",
    "purple heart",
    "sunglasses",
    "tree",
    "dog face",
    "umbrella",
    "crescent moon",
)
"""Prompts that the pictograms answer well."""

ABOUT = "Type to find pictures in the databases; a small network draws new ones from them."


def opened(
    databases: Sequence[str] = (),
    model: str = PICTOGRAMS,
    *,
    device: str | torch.device = "cpu",
    trust_database: bool = False,
) -> tuple[Studio, tuple[str, ...], str]:
    """A studio, prompts to try, and a sentence about the model.

    Args:
        databases: addresses, as `open_database` takes them; none: the model's own. The pictograms'
            own is opened as three, one for each style, and one of concepts never trained on.
        model: folder of a saved model, or the name of one with a package.
        device: of encoder and network.
        trust_database: see `Model.load`.

    Raises:
        ValueError: a database was made with another encoder, or the model has none and needs one.
        FileNotFoundError: something is not there.
    """
    given = [(_name(address), open_database(address)) for address in databases]
    parts: dict[str, Any] = {}
    if given:
        parts = {"database": given[0][1], "proposal": Uniform()}
    loaded = Model.load(model, trust_database=trust_database, **parts).to(device)
    ours = model in SHIPPED and not Path(model).exists()
    name = Path(str(model)).name or str(model)
    if given:
        shelves = Shelves([Shelf(name, database) for name, database in _numbered(given)])
    elif not isinstance(loaded.database, Searchable):
        raise ValueError(
            f"the model {name} was saved without a database: name one, retrodiff ui DATABASE"
        )
    elif ours and model == PICTOGRAMS:
        shelves = _styles(loaded.database)
    else:
        shelves = Shelves([Shelf(f"{name}'s own", loaded.database)])
    examples, about = (EXAMPLES, ABOUT) if ours and not given else ((), "")
    return Studio(loaded, shelves, name), examples, about


def _styles(database: Searchable) -> Shelves:
    """The pictograms' database as one for each style."""
    shelves = [Shelf(name, database.where(f"style == '{style}'")) for style, name in STYLES.items()]
    unseen = held_out()
    if unseen is not None:
        shelves.append(Shelf(UNSEEN, unseen, chosen=False))
    return Shelves(shelves, whole=database)


def _name(address: str) -> str:
    """The last part of an address."""
    return Path(str(address).rstrip("/")).name or str(address)


def _numbered(given: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The same with numbers after names that occur twice."""
    names = [name for name, _ in given]
    return [
        (f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name, database)
        for i, (name, database) in enumerate(given)
    ]
