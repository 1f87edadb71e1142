"""Published checkpoints in, saved models in and out, and the Hugging Face Hub."""

from retrodiff.checkpoints.compvis import load_compvis
from retrodiff.checkpoints.diffusers import load_diffusers
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.checkpoints.hub import fetch, publish
from retrodiff.checkpoints.load import load_published

__all__ = [
    "PUBLISHED",
    "Architecture",
    "PublishedModel",
    "fetch",
    "load_compvis",
    "load_diffusers",
    "load_published",
    "publish",
]
