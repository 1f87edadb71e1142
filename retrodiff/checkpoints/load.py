"""A published model from wherever it is: a checkpoint file, a diffusers folder, the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from retrodiff.checkpoints.compvis import load_compvis
from retrodiff.checkpoints.diffusers import load_diffusers
from retrodiff.checkpoints.hub import DIFFUSERS, fetch
from retrodiff.checkpoints.published import PUBLISHED, PublishedModel


def load_published(
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
) -> PublishedModel:
    """Networks and facts of a published checkpoint.

    Args:
        checkpoint: a ``.ckpt`` or ``.safetensors`` file, a diffusers folder, or the Hub name of one
            (``fusing/rdm``).
        config: the yaml of a checkpoint file.
        preset: a published model's name, in place of the yaml.
        weights: averaged, or those of the last step; diffusers folders hold one set only.
    """
    path = Path(checkpoint)
    if path.is_file():
        return load_compvis(path, None if config is None else config, preset, weights=weights)
    if not path.exists() and (path.suffix or len(path.parts) != 2):
        raise FileNotFoundError(f"{checkpoint} is neither a file, a folder nor a Hub name")
    return load_diffusers(fetch(str(checkpoint), patterns=DIFFUSERS))


def fresh(name: str) -> PublishedModel:
    """A published model's networks with fresh weights, to be trained or to be looked at."""
    architecture = PUBLISHED[name]
    unet, autoencoder = architecture.build()
    return PublishedModel(
        unet=unet.eval(),
        autoencoder=autoencoder.eval(),
        schedule=architecture.schedule,
        scale=architecture.scale,
        name=name,
        weights="raw",
        source="fresh weights",
    )
