"""Whole models by name: plain functions that fill a builder. The paper's is one among others.

Calling one builds the model; ``Builder.from_preset("rdm_imagenet", ...)`` gives the open recipe.
The paper's models come with ``checkpoint=`` the published file, a diffusers folder or a Hub name of
one; without it they have fresh weights, and sampling from them warns.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrodiff.builder import Builder, preset
from retrodiff.checkpoints.load import fresh, load_published
from retrodiff.checkpoints.published import PUBLISHED, PublishedModel
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    Dropped,
    EpsDenoiser,
    FlowDenoiser,
    Heun,
    NeighborEmbeddings,
    PixelUnshuffle,
    ScaledLinear,
    Unconditional,
)
from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import (
    Conditioner,
    Database,
    Encoder,
    Guidance,
    ProposalDistribution,
    Retriever,
    Sampler,
    Scale,
)
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder
from retrodiff.retrieval import NearestNeighbors

__all__ = ["ldm_imagenet", "rdm_768", "rdm_ffhq", "rdm_imagenet", "rdm_small"]

Checkpoint = str | Path | PublishedModel


@preset
def rdm_imagenet(
    *,
    checkpoint: Checkpoint | None = None,
    config: str | Path | None = None,
    encoder: Encoder | str | None = None,
    database: Database | str | Path | None = None,
    retriever: Retriever | None = None,
    proposal: ProposalDistribution | None = None,
    conditioner: Conditioner | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    k: int = 4,
) -> Builder:
    """The paper's ImageNet model, 256x256 (Blattmann et al. 2022): CLIP ViT-B/32, VQ f=4.

    Args:
        checkpoint: the published ``.ckpt``, a diffusers folder, or a loaded `PublishedModel`; None:
            fresh weights.
        config: the checkpoint's yaml; None: this preset's own numbers. Where the first stage is in
            a file of its own, hand in ``checkpoint=load_compvis(..., first_stage=...)``.
        encoder: None: CLIP ViT-B/32, fetched when first used.
        database: None: only text-only sampling works.
        retriever: None: the nearest neighbors.
        proposal: what unconditional sampling asks; None: it says how to make one.
        conditioner: None: raw embeddings, as the model was trained.
        guidance: None: classifier-free, scale 2.
        sampler: None: DDIM, eta 0.
        k: tokens that condition an image; in the text modes the text is one of them.
    """
    return _paper(
        "rdm_imagenet",
        checkpoint,
        config,
        encoder or CLIPEncoder("ViT-B-32-quickgelu", "openai", preprocessing="rdm"),
        database,
        retriever,
        proposal,
        conditioner,
        guidance or ClassifierFree(2.0),
        sampler,
        k,
    )


@preset
def rdm_ffhq(
    *,
    checkpoint: Checkpoint | None = None,
    config: str | Path | None = None,
    encoder: Encoder | str | None = None,
    database: Database | str | Path | None = None,
    retriever: Retriever | None = None,
    proposal: ProposalDistribution | None = None,
    conditioner: Conditioner | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    k: int = 4,
) -> Builder:
    """The paper's model of faces, 256x256; arguments as for `rdm_imagenet`."""
    return _paper(
        "rdm_ffhq",
        checkpoint,
        config,
        encoder or CLIPEncoder("ViT-B-32-quickgelu", "openai", preprocessing="rdm"),
        database,
        retriever,
        proposal,
        conditioner,
        guidance or ClassifierFree(2.0),
        sampler,
        k,
    )


@preset
def rdm_768(
    *,
    checkpoint: Checkpoint | None = None,
    config: str | Path | None = None,
    encoder: Encoder | str | None = None,
    database: Database | str | Path | None = None,
    retriever: Retriever | None = None,
    proposal: ProposalDistribution | None = None,
    conditioner: Conditioner | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    k: int = 11,
    convert_scale: bool = False,
) -> Builder:
    """The 768x768 model: CLIP ViT-L/14, KL f=16, unit embeddings, guidance 5, text + 10 neighbors.

    Arguments as for `rdm_imagenet`. ``checkpoint`` may be the diffusers folder ``fusing/rdm``. This
    model was trained on unit embeddings: a database that stores raw ones is refused unless
    ``convert_scale=True`` says that each is to be divided by its norm.
    """
    return _paper(
        "rdm_768",
        checkpoint,
        config,
        encoder or CLIPEncoder("ViT-L-14-quickgelu", "openai", preprocessing="rdm"),
        database,
        retriever,
        proposal,
        conditioner,
        guidance or ClassifierFree(5.0),
        sampler,
        k,
        convert_scale,
    )


@preset
def ldm_imagenet(*, sampler: Sampler | None = None) -> Builder:
    """The network of `rdm_imagenet` without retrieval: the parametric baseline, fresh weights.

    Args:
        sampler: None: DDIM, eta 0.
    """
    architecture = PUBLISHED["rdm_imagenet"]
    numbers: dict[str, Any] = {**architecture.unet, "context_width": None}
    network = UNet(**numbers)
    autoencoder = VQAutoencoder(**architecture.autoencoder)
    denoiser = EpsDenoiser(network, ScaledLinear())
    denoiser.untrained = True
    return (
        Builder()
        .conditioner(Unconditional())
        .denoiser(denoiser)
        .autoencoder(autoencoder)
        .sampler(sampler or DDIM())
        .defaults(steps=100)
    )


@preset
def rdm_small(
    *,
    encoder: Encoder,
    first_stage: PrincipalPatches | None = None,
    database: Database | None = None,
    retriever: Retriever | None = None,
    size: int = 32,
    channels: int = 96,
    k: int = 4,
) -> Builder:
    """A retrieval-augmented model that trains on a CPU in minutes: small pictures, fresh weights.

    The paper's UNet in small, on 4x4 patches of pixels, with flow matching; 10 % of the conditions
    are dropped in training, so that guidance has a null it was trained on.

    Args:
        encoder: what the database was built with.
        first_stage: ``PrincipalPatches.fit(images, patch=4, components=16)`` makes pictures far
            less noisy after short trainings; None: all 48 numbers of a patch, as they are.
        database: D; None: to be set before anything is retrieved.
        retriever: which neighbors; None: the nearest.
        size: side of the pictures, a multiple of 4.
        channels: of the UNet, a multiple of 32.
        k: neighbors per picture.
    """
    patch, width = (4, 48) if first_stage is None else (first_stage.patch, first_stage.components)
    if size % patch:
        raise ValueError(f"size={size} is no multiple of {patch}, the side of a patch")
    network = UNet(
        in_channels=width,
        out_channels=width,
        size=size // patch,
        channels=channels,
        multipliers=(1,),
        blocks_per_level=1,
        attention_factors=(1,),
        context_width=encoder.dim,
    )
    recipe = (
        Builder()
        .encoder(encoder)
        .retriever(retriever or NearestNeighbors())
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .autoencoder(first_stage or PixelUnshuffle(patch))
        .denoiser(FlowDenoiser(network))
        .sampler(Heun())
        .guidance(ClassifierFree(1.5))
        .defaults(k=k, steps=12)
    )
    return recipe if database is None else recipe.database(database)


def from_published(
    published: PublishedModel,
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
    schedule = ScaledLinear(
        published.schedule.start, published.schedule.end, published.schedule.length
    )
    recipe = (
        Builder()
        .conditioner(conditioner)
        .denoiser(EpsDenoiser(published.unet, schedule))
        .autoencoder(published.autoencoder)
        .retriever(NearestNeighbors())
        .sampler(DDIM())
        .guidance(ClassifierFree(2.0))
        .defaults(k=k, steps=100, prompt_template="An image of a {}.")
    )
    if encoder is not None:
        recipe = recipe.encoder(encoder)
    return recipe if database is None else recipe.database(database)


def _paper(
    name: str,
    checkpoint: Checkpoint | None,
    config: str | Path | None,
    encoder: Encoder | str,
    database: Database | str | Path | None,
    retriever: Retriever | None,
    proposal: ProposalDistribution | None,
    conditioner: Conditioner | None,
    guidance: Guidance,
    sampler: Sampler | None,
    k: int,
    convert_scale: bool = False,
) -> Builder:
    """What the paper's three models have in common."""
    architecture = PUBLISHED[name]
    if isinstance(checkpoint, PublishedModel):
        published = checkpoint
    elif checkpoint is not None:
        published = load_published(checkpoint, config=config, preset=name)
    else:
        published = fresh(name)
    if published.name not in (None, name):
        raise ValueError(
            f"{published.source} is the model {published.name}, not {name}: load it with "
            f"presets.{published.name}(checkpoint=...)"
        )
    recipe = from_published(
        published,
        scale=architecture.scale,
        encoder=encoder,
        k=k,
        convert_scale=convert_scale,
    )
    if checkpoint is None:
        recipe.slots["denoiser"].untrained = True
    recipe = recipe.guidance(guidance).retriever(retriever or NearestNeighbors())
    if conditioner is not None:
        recipe = recipe.conditioner(conditioner)
    if sampler is not None:
        recipe = recipe.sampler(sampler)
    if proposal is not None:
        recipe = recipe.proposal(proposal)
    return recipe if database is None else recipe.database(database)
