"""Finds the models that come in small packages of their own, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SHIPPED = {"pictograms": "retrodiff_pictograms"}
"""Name of a model -> the package that its folder ``model`` lies in."""


def shipped(name: str | Path) -> Path | None:
    """The folder of a shipped model; None: it is none of their names, or a folder is called so.

    Args:
        name: such as ``pictograms``.

    Raises:
        FileNotFoundError: its package is not installed.
    """
    package = SHIPPED.get(str(name))
    if package is None or Path(name).exists():
        return None
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"{name} is a model with a package of its own, {package}, which is not installed: "
            "install it, or name the folder of another model"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"
