"""The paper's diffusion models, and the same network without retrieval."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, Unpack

from retrodiff.builder import Builder, preset
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    EpsDenoiser,
    NeighborEmbeddings,
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
)
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder
from retrodiff.presets.published_family import Checkpoint, from_published, named, plain


class Chosen(TypedDict, total=False):
    """Options of the paper's presets; all have defaults.

    Attributes:
        checkpoint: the published ``.ckpt``, a diffusers folder, or a loaded `PublishedModel`; None:
            fresh weights.
        config: the checkpoint's yaml; None: the preset's own numbers. Where the first stage is in
            a file of its own, hand in ``checkpoint=load_compvis(..., first_stage=...)``.
        encoder: None: the CLIP that the model was trained with, fetched when first used.
        database: None: only text-only sampling works.
        retriever: None: the nearest neighbors.
        proposal: distribution of the queries of unconditional sampling; None: it says how to make
            one.
        conditioner: None: neighbor embeddings in the scale that the model was trained with.
        guidance: None: classifier-free, at the model's usual scale.
        sampler: None: DDIM, eta 0.
        k: tokens that condition an image; in the text modes the text is one of them.
    """

    checkpoint: Checkpoint | None
    config: str | Path | None
    encoder: Encoder | str | None
    database: Database | str | Path | None
    retriever: Retriever | None
    proposal: ProposalDistribution | None
    conditioner: Conditioner | None
    guidance: Guidance | None
    sampler: Sampler | str | None
    k: int


@preset
def rdm_imagenet(**chosen: Unpack[Chosen]) -> Builder:
    """The paper's ImageNet model, 256x256 (Blattmann et al. 2022): CLIP ViT-B/32, VQ f=4.

    Guidance 2, k = 4, raw embeddings.

    Args:
        chosen: ``checkpoint``, ``config``, ``encoder``, ``database``, ``retriever``, ``proposal``,
            ``conditioner``, ``guidance``, ``sampler`` and ``k``; see `Chosen`.
    """
    return _paper("rdm_imagenet", "ViT-B-32-quickgelu", 2.0, 4, chosen)


@preset
def rdm_ffhq(**chosen: Unpack[Chosen]) -> Builder:
    """The paper's model of faces, 256x256; arguments as for `rdm_imagenet`."""
    return _paper("rdm_ffhq", "ViT-B-32-quickgelu", 2.0, 4, chosen)


@preset
def rdm_768(*, convert_scale: bool = False, **chosen: Unpack[Chosen]) -> Builder:
    """The 768x768 model: CLIP ViT-L/14, KL f=16, unit embeddings, guidance 5, text + 10 neighbors.

    This model was trained on unit embeddings: a database that stores raw ones is refused unless
    ``convert_scale=True`` says that each is to be divided by its norm.

    Args:
        convert_scale: divide raw embeddings by their norm.
        chosen: as for `rdm_imagenet`; ``checkpoint`` may be the diffusers folder ``fusing/rdm``.
    """
    return _paper("rdm_768", "ViT-L-14-quickgelu", 5.0, 11, chosen, convert_scale)


@preset
def ldm_imagenet(*, sampler: Sampler | None = None) -> Builder:
    """The network of `rdm_imagenet` without retrieval: the parametric baseline, fresh weights.

    Args:
        sampler: None: DDIM, eta 0.
    """
    architecture = PUBLISHED["rdm_imagenet"]
    numbers: dict[str, Any] = {**architecture.unet, "context_width": None}
    return (
        Builder()
        .conditioner(Unconditional())
        .denoiser(lambda: _untrained(EpsDenoiser(UNet(**numbers), ScaledLinear())))
        .autoencoder(lambda: VQAutoencoder(**architecture.autoencoder))
        .sampler(sampler or DDIM())
        .defaults(steps=100)
    )


def _paper(
    name: str, encoder: str, scale: float, k: int, chosen: Chosen, convert_scale: bool = False
) -> Builder:
    """One of the paper's models: name, CLIP, guidance scale, tokens, and what is chosen."""
    clip = chosen.get("encoder") or CLIPEncoder(encoder, "openai", preprocessing="rdm")
    k, checkpoint = chosen.get("k", k), chosen.get("checkpoint")
    if checkpoint is None:
        recipe = _fresh(PUBLISHED[name], k, convert_scale).encoder(clip)
    else:
        recipe = from_published(
            named(name, checkpoint, chosen.get("config"), PublishedModel),
            scale=PUBLISHED[name].scale,
            encoder=clip,
            k=k,
            convert_scale=convert_scale,
        )
    recipe = recipe.guidance(ClassifierFree(scale))
    for slot in ("guidance", "retriever", "conditioner", "sampler", "proposal", "database"):
        if (value := chosen.get(slot)) is not None:
            recipe = getattr(recipe, slot)(value)
    return recipe


def _fresh(architecture: Architecture, k: int, convert_scale: bool) -> Builder:
    """The recipe of a published architecture, with new weights in every model."""

    def denoiser() -> EpsDenoiser:
        network = UNet(**architecture.unet).eval()
        return _untrained(EpsDenoiser(network, architecture.schedule))

    return (
        plain(k)
        .conditioner(NeighborEmbeddings(architecture.scale or "raw", convert=convert_scale))
        .denoiser(denoiser)
        .autoencoder(lambda: architecture.first_stage().eval())
    )


def _untrained(denoiser: EpsDenoiser) -> EpsDenoiser:
    denoiser.untrained = True
    return denoiser
