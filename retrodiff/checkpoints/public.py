"""The public names of components in files, such as ``diffusion.DDIM``.

Files name components as users import them, so that modules can be moved without breaking a saved
model. Only what has such a name is ever constructed from a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from functools import lru_cache
from typing import Any

from torch import nn

from retrodiff.interfaces import Fingerprint
from retrodiff.text import printable

PACKAGE = __name__.split(".")[0]

ROOMS = ("autoregressive", "diffusion", "networks", "retrieval")
"""Where the public components are: those that these packages export, under ``room.Name``."""

ALIASES = {
    "diffusion": ("autoencoder", "conditioner", "denoiser", "guidance", "sampler", "schedule"),
    "networks": ("dit", "kl", "principal", "unet", "vq"),
    "retrieval": ("fusion", "proposal", "retriever"),
    "interfaces": (),
}
"""Modules whose paths format 1 kept, by the room that their components are public in."""


def public_name(kind: type) -> str | None:
    """What a component's class is called in files, such as ``diffusion.DDIM``; None: it isn't."""
    if kind is Fingerprint:
        return "interfaces.Fingerprint"
    for room in ROOMS:
        if _public(room).get(kind.__name__) is kind:
            return f"{room}.{kind.__name__}"
    return None


def class_named(name: Any) -> type:
    """The component of a public name, or of the module path that format 1 kept.

    Raises:
        ValueError: it is no component of this package.
    """
    shown = repr(printable(str(name)[:200]))
    if not isinstance(name, str):
        raise ValueError(f"the file names the class {shown}, which is no name")
    room, _, attribute = name.rpartition(".")
    if room.startswith(f"{PACKAGE}."):
        room, _, module = room.removeprefix(f"{PACKAGE}.").partition(".")
        if module and module not in ALIASES.get(room, ()):
            room = ""
        elif not module and room not in ALIASES:
            room = ""
    elif room not in (*ROOMS, "interfaces"):
        raise ValueError(f"the file names the class {shown}, which is not part of {PACKAGE}")
    if room == "interfaces" and attribute == "Fingerprint":
        return Fingerprint
    kind = _public(room).get(attribute) if room in ROOMS else None
    if kind is None:
        raise ValueError(
            f"the file names {shown}, which is no component of this version of {PACKAGE}: update "
            "it, or use a file of this version"
        )
    return kind


@lru_cache
def _public(room: str) -> dict[str, type]:
    """The components that a package exports: dataclasses, and modules that know their arguments."""
    module = importlib.import_module(f"{PACKAGE}.{room}")
    return {
        name: kind
        for name in module.__all__
        if isinstance(kind := getattr(module, name), type) and _told(kind)
    }


def _told(kind: type) -> bool:
    """Whether the arguments of an object can be asked for, and are no functions."""
    if dataclasses.is_dataclass(kind):
        return not any("Callable" in str(field.type) for field in dataclasses.fields(kind))
    told = callable(getattr(kind, "config", None)) and not inspect.isabstract(kind)
    return issubclass(kind, nn.Module) and told
