"""Whole models by name: plain functions that fill a builder. The paper's is one among others.

Calling one builds the model; ``Builder.from_preset(rdm_imagenet, ...)`` gives the open recipe.
The paper's models come with ``checkpoint=`` the published file, a diffusers folder or a Hub name of
one; without it they have fresh weights, and sampling from them warns.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from retrodiff.autoregressive import AutoregressiveGenerator
from retrodiff.builder import Builder, preset
from retrodiff.checkpoints.foreign.load import load_published
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import PUBLISHED_TOKENS, PublishedTransformer
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    Folded,
    Heun,
    Identity,
    NeighborEmbeddings,
    NeighborPatches,
    PixelUnshuffle,
    Pooled,
    PromptAndNeighbors,
    Rescaled,
    ScaledLinear,
    Unconditional,
)
from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Database,
    Encoder,
    Guidance,
    ProposalDistribution,
    Retriever,
    Sampler,
    Scale,
)
from retrodiff.model import Model
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder
from retrodiff.relatives import (
    instance_conditioned,
    knn_diffusion,
    ldm,
    region_retrieval,
    unclip,
    unclip_prior,
)
from retrodiff.retrieval import NearestNeighbors

__all__ = [
    "instance_conditioned",
    "knn_diffusion",
    "ldm",
    "ldm_imagenet",
    "rarm_animals",
    "rarm_dogs",
    "rarm_mammals",
    "rdm_768",
    "rdm_ffhq",
    "rdm_imagenet",
    "rdm_pictograms",
    "rdm_small",
    "region_retrieval",
    "unclip",
    "unclip_prior",
]

Published = PublishedModel | PublishedTransformer
Checkpoint = str | Path | Published
P = TypeVar("P", PublishedModel, PublishedTransformer)


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


class ChosenTokens(TypedDict, total=False):
    """Options of the paper's autoregressive presets; all have defaults.

    Attributes:
        checkpoint: the published ``.ckpt`` or a loaded `PublishedTransformer`; None: fresh weights.
        config: the checkpoint's yaml; None: the preset's own numbers.
        encoder: None: the CLIP that the model was trained with, fetched when first used.
        database: None: only text-only sampling works.
        retriever: None: the nearest neighbors.
        proposal: distribution of the queries of unconditional sampling.
        conditioner: None: raw neighbor embeddings.
        guidance: scale in the logits; 1 by default, as the paper samples.
        temperature: divides the logits; 1 by default.
        top_k: codes that are drawn from; 256 by default, None: all.
        k: tokens that condition an image.
    """

    checkpoint: Checkpoint | None
    config: str | Path | None
    encoder: Encoder | str | None
    database: Database | str | Path | None
    retriever: Retriever | None
    proposal: ProposalDistribution | None
    conditioner: Conditioner | None
    guidance: float
    temperature: float
    top_k: int | None
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
def rarm_dogs(**chosen: Unpack[ChosenTokens]) -> Builder:
    """The autoregressive model of dogs, 256x256 (RARM, Blattmann et al. 2022): CLIP, VQ f=16.

    It was trained on neighbors alone: ask prompts with ``mode="neighbors"`` or ``mode="text"``.

    Args:
        chosen: ``checkpoint``, ``config``, ``encoder``, ``database``, ``retriever``, ``proposal``,
            ``conditioner``, ``guidance``, ``temperature``, ``top_k`` and ``k``; see `ChosenTokens`.
    """
    return _rarm("rarm_dogs", chosen)


@preset
def rarm_mammals(**chosen: Unpack[ChosenTokens]) -> Builder:
    """The autoregressive model of mammals; arguments as for `rarm_dogs`."""
    return _rarm("rarm_mammals", chosen)


@preset
def rarm_animals(**chosen: Unpack[ChosenTokens]) -> Builder:
    """The autoregressive model of animals; arguments as for `rarm_dogs`."""
    return _rarm("rarm_animals", chosen)


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


@preset
def rdm_small(
    *,
    encoder: Encoder,
    first_stage: PrincipalPatches | KLAutoencoder | VQAutoencoder | None = None,
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
            less noisy after short trainings; an autoencoder that ``train-autoencoder`` made takes
            larger pictures; None: all 48 numbers of a patch, as they are.
        database: D; None: to be set before anything is retrieved.
        retriever: which neighbors; None: the nearest.
        size: side of the pictures, a multiple of 4.
        channels: of the UNet, a multiple of 32.
        k: neighbors per picture.

    Raises:
        ValueError: ``size`` is no multiple of the side of a patch.
    """
    if first_stage is None:
        patch, width = 4, 48
    elif isinstance(first_stage, PrincipalPatches):
        patch, width = first_stage.patch, first_stage.components
    else:
        patch, width = first_stage.factor, first_stage.latent_channels
    if size % patch:
        raise ValueError(f"size={size} is no multiple of {patch}, the side of a patch")

    def denoiser() -> FlowDenoiser:
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
        return FlowDenoiser(network)

    recipe = (
        Builder()
        .encoder(encoder)
        .retriever(retriever or NearestNeighbors())
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .autoencoder(first_stage or PixelUnshuffle(patch))
        .denoiser(denoiser)
        .sampler(Heun())
        .guidance(ClassifierFree(1.5))
        .defaults(k=k, steps=12)
    )
    return recipe if database is None else recipe.database(database)


@preset
def rdm_pictograms(
    *,
    encoder: Encoder | None = None,
    first_stage: Autoencoder | None = None,
    database: Database | None = None,
    proposal: ProposalDistribution | None = None,
    channels: int = 96,
    k: int = 4,
    pretrained: bool = False,
) -> Builder:
    """Pictograms of 64x64 pixels: what to draw and in which style is what the database says.

    A UNet of 3.6 million weights on latents of 4 x 16 x 16, folded to 16 x 8 x 8; EDM
    preconditioning; prompt and neighbors as two streams of tokens, their means beside the timestep,
    and a third stream of the cells of the neighbors' pictures (`NeighborPatches`), so that D must
    have pictures.

    Examples:
        >>> model = rdm_pictograms(pretrained=True)  # doctest: +SKIP
        >>> model.sample(prompts=["a robot wearing a hat"]).save("out")  # doctest: +SKIP

    Args:
        encoder: a small CLIP; None: to be set before prompts or images are asked.
        first_stage: 64x64 pictures to latents (4, 16, 16) of unit variance; None: images are
            latents already, as in training on latents that were encoded before.
        database: D; None: only text-only sampling works.
        proposal: distribution of the queries of unconditional sampling.
        channels: of both levels of the UNet, a multiple of 96.
        k: neighbors of a picture; in the text modes the prompt is one of them.
        pretrained: the trained model of the package ``retrodiff-pictograms``, with its encoder,
            first stage and database, unless others are given; False: fresh weights.

    Raises:
        FileNotFoundError: ``pretrained``, and the package is not installed.
        ValueError: ``pretrained`` and other ``channels`` than the trained network has.
    """
    given = {"encoder": encoder, "database": database, "proposal": proposal}
    given = {slot: part for slot, part in given.items() if part is not None}
    if pretrained:
        if channels != 96:
            raise ValueError(
                f"channels={channels}, but the pretrained network has 96: leave one of the two out"
            )
        first = {} if first_stage is None else {"autoencoder": first_stage}
        model = Model.load("pictograms").replace(**given, **first, k=k)
        return Builder().set(**{s: part for s, part in model.parts().items() if part is not None})
    width = 256 if encoder is None else encoder.dim
    tokens = Rescaled(Pooled(PromptAndNeighbors("unit")), width**0.5)
    patches = NeighborPatches(tokens, channels=16, size=8, grid=4)

    def denoiser() -> EDMDenoiser:
        network = UNet(
            in_channels=16,
            out_channels=16,
            size=8,
            channels=channels // 3,
            multipliers=(3, 3),
            blocks_per_level=1,
            attention_factors=(1, 2),
            context_width=width + patches.extra,
            streams=("query", "neighbors", "patches"),
            vector_width=2 * width,
        )
        return EDMDenoiser(
            network, sigma_data=1.0, mean=0.3, std=1.4, sigma_min=0.01, sigma_max=40.0
        )

    recipe = (
        Builder()
        .retriever(NearestNeighbors())
        .conditioner(Dropped(patches, 0.1))
        .autoencoder(Folded(first_stage or Identity(), 2))
        .denoiser(denoiser)
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(2.0))
        .defaults(k=k, steps=16, prompt_template="{}")
    )
    return recipe.set(**given)


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
        recipe = _plain_tokens(k, published.transformer.length).generator(generator)
    else:
        recipe = (
            _plain(k)
            .denoiser(EpsDenoiser(published.unet, published.schedule))
            .autoencoder(published.autoencoder)
        )
    recipe = recipe.conditioner(conditioner)
    if encoder is not None:
        recipe = recipe.encoder(encoder)
    return recipe if database is None else recipe.database(database)


def _paper(
    name: str, encoder: str, scale: float, k: int, chosen: Chosen, convert_scale: bool = False
) -> Builder:
    """One of the paper's models: name, CLIP, guidance scale, tokens, and what is chosen."""
    _check_names(name, chosen, Chosen)
    clip = chosen.get("encoder") or CLIPEncoder(encoder, "openai", preprocessing="rdm")
    k, checkpoint = chosen.get("k", k), chosen.get("checkpoint")
    if checkpoint is None:
        recipe = _fresh(PUBLISHED[name], k, convert_scale).encoder(clip)
    else:
        recipe = from_published(
            _named(name, checkpoint, chosen.get("config"), PublishedModel),
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


def _rarm(name: str, chosen: ChosenTokens) -> Builder:
    """One of the paper's autoregressive models, and what is chosen."""
    _check_names(name, chosen, ChosenTokens)
    architecture, checkpoint = PUBLISHED_TOKENS[name], chosen.get("checkpoint")
    clip = chosen.get("encoder") or CLIPEncoder("ViT-B-32-quickgelu", "openai", preprocessing="rdm")
    numbers: dict[str, Any] = {
        "guidance": chosen.get("guidance", 1.0),
        "temperature": chosen.get("temperature", 1.0),
        "top_k": chosen.get("top_k", 256),
    }
    published = None
    if checkpoint is not None:
        published = _named(name, checkpoint, chosen.get("config"), PublishedTransformer)

    def generator() -> AutoregressiveGenerator:
        if published is not None:
            network, first_stage = published.transformer, published.autoencoder
            return AutoregressiveGenerator(network=network, autoencoder=first_stage, **numbers)
        network, first_stage = architecture.build()
        network.untrained = True
        return AutoregressiveGenerator(
            network=network.eval(), autoencoder=first_stage.eval(), **numbers
        )

    recipe = (
        _plain_tokens(chosen.get("k", 4), architecture.transformer["grid"][0] ** 2)
        .conditioner(NeighborEmbeddings(architecture.scale or "raw"))
        .encoder(clip)
        .generator(generator if published is None else generator())
    )
    for slot in ("retriever", "conditioner", "proposal", "database"):
        if (value := chosen.get(slot)) is not None:
            recipe = getattr(recipe, slot)(value)
    return recipe


def _check_names(name: str, chosen: Any, kind: type) -> None:
    known = list(kind.__annotations__)
    if unknown := sorted(set(chosen) - set(known)):
        raise TypeError(f"{name} has no argument {', '.join(unknown)}: it takes {', '.join(known)}")


def _fresh(architecture: Architecture, k: int, convert_scale: bool) -> Builder:
    """The recipe of a published architecture, with new weights in every model."""

    def denoiser() -> EpsDenoiser:
        network = UNet(**architecture.unet).eval()
        return _untrained(EpsDenoiser(network, architecture.schedule))

    return (
        _plain(k)
        .conditioner(NeighborEmbeddings(architecture.scale or "raw", convert=convert_scale))
        .denoiser(denoiser)
        .autoencoder(lambda: architecture.first_stage().eval())
    )


def _named(name: str, checkpoint: Checkpoint, config: str | Path | None, kind: type[P]) -> P:
    """A loaded checkpoint, which must be that of the named model or of none that is known."""
    if isinstance(checkpoint, (str, Path)):
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


def _plain(k: int) -> Builder:
    """What the models of the published family have in common."""
    return (
        Builder()
        .retriever(NearestNeighbors())
        .sampler(DDIM())
        .guidance(ClassifierFree(2.0))
        .defaults(k=k, steps=100, prompt_template="An image of a {}.")
    )


def _plain_tokens(k: int, codes: int) -> Builder:
    """What the autoregressive models of the family have in common."""
    return (
        Builder()
        .retriever(NearestNeighbors())
        .defaults(k=k, steps=codes, prompt_template="An image of a {}.")
    )


def _untrained(denoiser: EpsDenoiser) -> EpsDenoiser:
    denoiser.untrained = True
    return denoiser
