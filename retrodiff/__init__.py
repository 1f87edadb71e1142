"""Composable retrieval and diffusion primitives for images.

A small network plus a large, swappable image database: train and run retrieval-augmented diffusion
models on your own pictures. The public names are here; submodules are loaded when first used, so
``import retrodiff`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retrodiff import presets, testing
    from retrodiff.builder import Builder, preset
    from retrodiff.databases import build_database, open_database
    from retrodiff.interfaces import (
        Autoencoder,
        Conditioner,
        Context,
        Database,
        Denoiser,
        Encoder,
        Fingerprint,
        Generator,
        Guidance,
        Index,
        Neighbors,
        Prior,
        ProposalDistribution,
        Query,
        Randomness,
        Retriever,
        Sampler,
        Schedule,
        TextEncoder,
        Tokens,
    )
    from retrodiff.model import Model
    from retrodiff.model.generated import Generation

_HOME = {
    "Builder": "builder",
    "preset": "builder",
    "Model": "model",
    "Generation": "model.generated",
    "build_database": "databases",
    "open_database": "databases",
    **dict.fromkeys(
        [
            "Autoencoder",
            "Conditioner",
            "Context",
            "Database",
            "Denoiser",
            "Encoder",
            "Fingerprint",
            "Generator",
            "Guidance",
            "Index",
            "Neighbors",
            "Prior",
            "ProposalDistribution",
            "Query",
            "Randomness",
            "Retriever",
            "Sampler",
            "Schedule",
            "TextEncoder",
            "Tokens",
        ],
        "interfaces",
    ),
}

__all__ = [
    "Autoencoder",
    "Builder",
    "Conditioner",
    "Context",
    "Database",
    "Denoiser",
    "Encoder",
    "Fingerprint",
    "Generation",
    "Generator",
    "Guidance",
    "Index",
    "Model",
    "Neighbors",
    "Prior",
    "ProposalDistribution",
    "Query",
    "Randomness",
    "Retriever",
    "Sampler",
    "Schedule",
    "TextEncoder",
    "Tokens",
    "build_database",
    "open_database",
    "preset",
    "presets",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in ("presets", "testing"):
        return importlib.import_module(f"retrodiff.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"retrodiff.{_HOME[name]}"), name)
    raise AttributeError(f"module 'retrodiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
