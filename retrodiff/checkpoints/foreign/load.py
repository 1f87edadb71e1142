"""Loads a published model: from a checkpoint file, a diffusers folder, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from retrodiff.checkpoints.foreign.compvis import load_compvis
from retrodiff.checkpoints.foreign.diffusers import load_diffusers
from retrodiff.checkpoints.foreign.pipeline_files import NAME
from retrodiff.checkpoints.foreign.published import PUBLISHED, PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import PublishedTransformer
from retrodiff.checkpoints.hub import fetch_pipeline


def load_published(
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    first_stage: str | Path | None = None,
    variant: str | None = None,
) -> PublishedModel | PublishedTransformer:
    """Networks and facts of a published checkpoint.

    Args:
        checkpoint: a ``.ckpt`` or ``.safetensors`` file, a diffusers folder, or the Hub name of one
            (``fusing/rdm``).
        config: the yaml of a checkpoint file.
        preset: a published model's name, in place of the yaml.
        weights: averaged, or those of the last step; diffusers folders hold one set only.
        first_stage: a file of its own for the first stage of a checkpoint file without one.
        variant: of a diffusers folder's weight files, such as ``fp16``; see `load_diffusers`.

    Raises:
        FileNotFoundError: there is neither a file, a folder nor such a name on the Hub.
        ValueError: it is a saved model of this library or one part of a pipeline, or its tensors or
            settings do not fit.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file() and path.name.startswith(NAME):
        raise ValueError(
            f"{path} is one part of a diffusers pipeline: hand in the folder that holds unet/ and "
            "vae/"
        )
    if path.is_file():
        return load_compvis(path, config, preset, weights=weights, first_stage=first_stage)
    if (path / "model.json").is_file():
        raise ValueError(
            f"{path} is a saved model, no published checkpoint: open it with Model.load"
        )
    if not path.exists() and (path.suffix or len(path.parts) != 2):
        raise FileNotFoundError(f"{checkpoint} is neither a file, a folder nor a Hub name")
    folder = path if path.is_dir() else fetch_pipeline(str(checkpoint), variant)
    return load_diffusers(folder, variant=variant)


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
