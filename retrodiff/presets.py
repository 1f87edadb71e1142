"""Whole models by name: plain functions that fill a builder. The paper's is one among others.

Calling one builds the model; ``Builder.from_preset("rdm_small", ...)`` gives the open recipe.
"""

from __future__ import annotations

from retrodiff.builder import Builder, preset
from retrodiff.diffusion import (
    ClassifierFree,
    Dropped,
    FlowDenoiser,
    Heun,
    NeighborEmbeddings,
    PixelUnshuffle,
)
from retrodiff.interfaces import Database, Encoder, Retriever
from retrodiff.networks.unet import UNet
from retrodiff.retrieval import NearestNeighbors

__all__ = ["rdm_small"]


@preset
def rdm_small(
    *,
    encoder: Encoder,
    database: Database | None = None,
    retriever: Retriever | None = None,
    size: int = 32,
    channels: int = 64,
    k: int = 4,
) -> Builder:
    """A retrieval-augmented model that trains on a CPU in minutes: small pictures, fresh weights.

    The paper's UNet in small, on pixels folded two by two into channels, with flow matching; 10 %
    of the conditions are dropped in training, so that guidance has a null it was trained on.

    Args:
        encoder: what the database was built with.
        database: D; None: to be set before anything is retrieved.
        retriever: which neighbors; None: the nearest.
        size: side of the pictures, a multiple of 4.
        channels: of the UNet's first level, a multiple of 32.
        k: neighbors per picture.
    """
    network = UNet(
        in_channels=12,
        out_channels=12,
        size=size // 2,
        channels=channels,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(),
        context_width=encoder.dim,
    )
    recipe = (
        Builder()
        .encoder(encoder)
        .retriever(retriever or NearestNeighbors())
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .autoencoder(PixelUnshuffle(2))
        .denoiser(FlowDenoiser(network))
        .sampler(Heun())
        .guidance(ClassifierFree(1.5))
        .defaults(k=k, steps=20)
    )
    return recipe if database is None else recipe.database(database)
