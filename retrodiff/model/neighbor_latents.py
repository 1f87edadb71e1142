"""The neighbors' pictures in the first stage of a model, for conditioners that see them."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrodiff.interfaces import Autoencoder, Conditioner, Database, Neighbors, member

BATCH = 64
"""Pictures that are encoded at once."""

PROBE = 64
"""Pixels of a picture that tells by how much the first stage shrinks one."""


@torch.no_grad()
def seen(
    neighbors: Neighbors,
    conditioner: Conditioner,
    database: Database | None,
    autoencoder: Autoencoder | None,
) -> Neighbors:
    """The neighbors with their latents, where the conditioner sees them; else as they are.

    Each picture is read and encoded once, however often it was found. Latents that the neighbors
    have already, from a table of a training set, are kept.

    Args:
        neighbors: found in the database, (b, k).
        conditioner: of the model.
        database: D, with pictures: thumbnails, or the files that records name.
        autoencoder: the first stage; ``encode`` takes (b, 3, h, w) in [-1, 1].

    Raises:
        ValueError: the database has no pictures, or the neighbors belong to regions.
    """
    shape = member(conditioner, Conditioner, "latents_shape")
    if shape is None or neighbors.latents is not None:
        return neighbors
    if neighbors.indices.ndim != 2:
        raise ValueError(
            f"{type(conditioner).__name__} sees the pictures of whole neighbors (b, k), but these "
            f"belong to regions, {tuple(neighbors.indices.shape)}"
        )
    rows, at = neighbors.indices.unique(return_inverse=True)
    known = rows[rows >= 0]
    latents = torch.zeros(len(rows), *shape)
    if len(known):
        found = encoded_pictures(known, database, autoencoder, shape)
        latents[rows >= 0] = found.to(latents)
    return replace(neighbors, latents=latents[at].to(neighbors.embeddings.device))


@torch.no_grad()
def encoded_pictures(
    rows: Tensor,
    database: Database | None,
    autoencoder: Autoencoder | None,
    shape: tuple[int, int, int],
) -> Tensor:
    """Pictures of some rows -> latents (n, c, h, w), such as a table for a training set."""
    image: Any = getattr(database, "image", None)
    if image is None or autoencoder is None:
        missing = "a first stage" if autoencoder is None else "a database with pictures"
        raise ValueError(
            f"the conditioner sees neighbors' pictures, but this model lacks {missing}"
        )
    probe = torch.zeros(1, 3, PROBE, PROBE, device=autoencoder.device, dtype=autoencoder.dtype)
    side = shape[-1] * PROBE // autoencoder.encode(probe).shape[-1]
    found: list[Tensor] = []
    for part in rows.split(BATCH):
        pictures = torch.stack([_squared(image(int(row)), side) for row in part])
        found.append(autoencoder.encode(pictures.to(probe)).float().cpu())
    latents = torch.cat(found)
    if latents.shape[1:] != shape:
        raise ValueError(
            f"the first stage gives latents of shape {tuple(latents.shape[1:])}, but the "
            f"conditioner sees {shape}: make it for the model's own first stage"
        )
    return latents


def _squared(picture: Tensor, side: int) -> Tensor:
    """The middle of a picture (3, h, w), side x side pixels."""
    h, w = picture.shape[-2:]
    if (h, w) == (side, side):
        return picture
    short = min(h, w)
    top, left = (h - short) // 2, (w - short) // 2
    middle = picture[None, :, top : top + short, left : left + short]
    return F.interpolate(middle, (side, side), mode="bilinear", antialias=True)[0]
