"""Any checkpoint of the published family as a recipe, and what the paper's presets share."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from retrodiff.autoregressive import AutoregressiveGenerator
from retrodiff.builder import Builder
from retrodiff.checkpoints.foreign.published import PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import PublishedTransformer
from retrodiff.diffusion import DDIM, ClassifierFree, EpsDenoiser, NeighborEmbeddings
from retrodiff.interfaces import Database, Encoder, Scale
from retrodiff.retrieval import NearestNeighbors

Published = PublishedModel | PublishedTransformer
Checkpoint = str | Path | Published
P = TypeVar("P", PublishedModel, PublishedTransformer)


def from_published(
    published: Published,
    *,
    scale: Scale | None = None,
    encoder: Encoder | str | None = None,
    database: Database | str | Path | None = None,
    k: int = 4,
    convert_scale: bool = False,
) -> Builder:
    """The recipe of any checkpoint of the published family, its own numbers kept.

    Args:
        published: what `retrodiff.checkpoints.load_compvis` or `load_diffusers` returned.
        scale: of the embeddings it was trained with, where the checkpoint does not say.
        encoder: what made those embeddings; None: to be set before prompts or images are asked.
        database: None: to be set before anything is retrieved.
        k: tokens that condition an image.
        convert_scale: take a database of raw embeddings for a checkpoint of unit ones, each divided
            by its norm; False: refuse it.

    Raises:
        ValueError: the scale is unknown, or contradicts the checkpoint's.
    """
    conditioner = NeighborEmbeddings(published.agreed_scale(scale), convert=convert_scale)
    if isinstance(published, PublishedTransformer):
        generator = AutoregressiveGenerator(
            network=published.transformer, autoencoder=published.autoencoder, top_k=256
        )
        recipe = plain_tokens(k, published.transformer.length).generator(generator)
    else:
        recipe = (
            plain(k)
            .denoiser(EpsDenoiser(published.unet, published.schedule))
            .autoencoder(published.autoencoder)
        )
    recipe = recipe.conditioner(conditioner)
    if encoder is not None:
        recipe = recipe.encoder(encoder)
    return recipe if database is None else recipe.database(database)


def named(name: str, checkpoint: Checkpoint, config: str | Path | None, kind: type[P]) -> P:
    """A loaded checkpoint, which must be that of the named model or of none that is known."""
    if isinstance(checkpoint, (str, Path)):
        # Imported where it is needed: reading other projects' files takes a fifth of all imports.
        from retrodiff.checkpoints.foreign.load import load_published

        checkpoint = load_published(checkpoint, config=config, preset=name)
    if checkpoint.name not in (None, name):
        raise ValueError(
            f"{checkpoint.source} is the model {checkpoint.name}, not {name}: load it with "
            f"presets.{checkpoint.name}(checkpoint=...)"
        )
    if not isinstance(checkpoint, kind):
        raise ValueError(
            f"{checkpoint.source} is a {type(checkpoint).__name__}, but {name} takes a "
            f"{kind.__name__}: load it with presets.from_published(...)"
        )
    return checkpoint


def plain(k: int) -> Builder:
    """What the models of the published family have in common."""
    return (
        Builder()
        .retriever(NearestNeighbors())
        .sampler(DDIM())
        .guidance(ClassifierFree(2.0))
        .defaults(k=k, steps=100, prompt_template="An image of a {}.")
    )


def plain_tokens(k: int, codes: int) -> Builder:
    """What the autoregressive models of the family have in common."""
    return (
        Builder()
        .retriever(NearestNeighbors())
        .defaults(k=k, steps=codes, prompt_template="An image of a {}.")
    )
