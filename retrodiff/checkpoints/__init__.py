"""Loads published checkpoints, saves and loads models, and uses the Hugging Face Hub."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from retrodiff.checkpoints.first_stages import load_autoencoder, save_autoencoder
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import (
    PUBLISHED_TOKENS,
    PublishedTransformer,
    TokenArchitecture,
)
from retrodiff.checkpoints.hub import fetch, publish

if TYPE_CHECKING:
    from retrodiff.checkpoints.foreign.compvis import load_compvis
    from retrodiff.checkpoints.foreign.diffusers import load_diffusers
    from retrodiff.checkpoints.foreign.load import load_published

__all__ = [
    "PUBLISHED",
    "PUBLISHED_TOKENS",
    "Architecture",
    "PublishedModel",
    "PublishedTransformer",
    "TokenArchitecture",
    "fetch",
    "load_autoencoder",
    "load_compvis",
    "load_diffusers",
    "load_published",
    "publish",
    "save_autoencoder",
]

READERS = {"load_compvis": "compvis", "load_diffusers": "diffusers", "load_published": "load"}
"""Functions that are imported when they are asked for, and the files that they are in."""


def __getattr__(name: str) -> Any:
    """The readers of other projects' files, which few programs need."""
    if name in READERS:
        module = importlib.import_module(f"retrodiff.checkpoints.foreign.{READERS[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
