"""Loads published checkpoints, saves and loads models, and uses the Hugging Face Hub."""

from retrodiff.checkpoints.first_stages import load_autoencoder, save_autoencoder
from retrodiff.checkpoints.foreign.compvis import load_compvis
from retrodiff.checkpoints.foreign.diffusers import load_diffusers
from retrodiff.checkpoints.foreign.load import load_published
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import (
    PUBLISHED_TOKENS,
    PublishedTransformer,
    TokenArchitecture,
)
from retrodiff.checkpoints.hub import fetch, publish

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
