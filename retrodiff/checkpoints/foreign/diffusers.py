"""Reads folders in the layout of diffusers, such as the 768 model's ``fusing/rdm``.

``model_index.json`` beside ``unet/``, ``vae/`` or ``vqvae/``, and ``scheduler/``. The json files
are parsed and the weights read by name; the library itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from retrodiff.checkpoints.foreign.diffusers_config import read_architecture
from retrodiff.checkpoints.foreign.lookalikes import check_weights_file
from retrodiff.checkpoints.foreign.pipeline_files import (
    NAME,
    chosen,
    missing_shards,
    present,
    shards,
)
from retrodiff.checkpoints.foreign.published import PublishedModel
from retrodiff.checkpoints.foreign.tensor_names import diffusers_autoencoder, diffusers_unet
from retrodiff.checkpoints.foreign.transfer import Transfer, their_names
from retrodiff.checkpoints.sharded import load_shards


def load_diffusers(
    folder: str | Path,
    *,
    scale_factor: float | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> PublishedModel:
    """Loads the networks of a pipeline folder.

    Args:
        folder: with ``unet/``, ``vae/`` or ``vqvae/``, and ``scheduler/``.
        scale_factor: of the latents; None: the folder's, else that of the published model with this
            architecture.
        dtype: of the networks.
        variant: of the weight files, such as ``fp16`` or ``non_ema``; None: the full weights, or
            the only variant where there are none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the pipeline is of another family, there are several variants
            to choose from, or the weights are not finite.
    """
    folder = Path(folder)
    if not (folder / "unet" / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no unet/config.json: hand in the folder of a diffusers pipeline"
        )
    first_stage = next((n for n in ("vqvae", "vae") if (folder / n).is_dir()), "vae")
    architecture = read_architecture(folder, first_stage, scale_factor)
    with torch.device("meta"):
        unet, autoencoder = architecture.build()

    networks = Transfer(str(folder / "unet"), _weights(folder / "unet", variant))
    names = diffusers_unet(unet.config())
    networks.plan(unet, names)
    networks.extra(sorted(networks.tensors.keys() - set(their_names(unet, names).values())))

    second = Transfer(str(folder / first_stage), _weights(folder / first_stage, variant))
    old = any(".attentions.0.query." in name for name in second.tensors)
    names = diffusers_autoencoder(autoencoder.config(), old=old)
    second.plan(autoencoder, names)
    second.extra(sorted(second.tensors.keys() - set(their_names(autoencoder, names).values())))

    for transfer in (networks, second):
        transfer.check("Does its config.json belong to these weights?")
    for transfer in (networks, second):
        transfer.fill(dtype)
    return PublishedModel(
        unet=unet.eval(),
        autoencoder=autoencoder.eval(),
        schedule=architecture.schedule,
        scale=architecture.scale,
        name=architecture.name,
        weights="raw"
        if "non_ema" in str(chosen(present(folder / "unet"), "", variant))
        else "unknown",
        source=str(folder),
    )


def _weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Safetensors where there are any, else pickles that may hold tensors only."""
    opener = chosen(present(folder), str(folder), variant)
    if opener is None:
        raise FileNotFoundError(
            f"{folder} has no {NAME}.safetensors or .bin, whole, as a variant or in shards: fetch "
            "the pipeline's weights"
        )
    if missing := missing_shards(folder / opener):
        raise FileNotFoundError(
            f"{folder / missing[0]} is missing, {opener} names it: fetch the pipeline's weights"
        )
    if opener.endswith(".safetensors"):
        check_weights_file(folder / opener)
    if ".safetensors" in opener:
        return load_shards(folder / opener)
    if not opener.endswith(".json"):
        return _pickled(folder / opener)
    tensors: dict[str, Tensor] = {}
    for file in shards(folder / opener):
        tensors |= _pickled(folder / file)
    return tensors


def _pickled(file: Path) -> dict[str, Tensor]:
    check_weights_file(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many kinds, from the zip reader to the unpickler
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file} is damaged, or holds more than tensors: {reason}") from error
    if not (isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())):
        raise ValueError(f"{file} does not hold tensors by name")
    return cast("dict[str, Tensor]", tensors)
