"""The systems around the paper, each as a preset of the same small network with other parts.

They are small models to train with `retrodiff.training.fit`, on pictures or on latents of
``latent=(channels, side, side)``; nothing is published for them. All of them share `_small`, so
that what a preset says is what the system is. See *Relatives* in the documentation.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from typing import TypedDict, Unpack

from torch import Tensor

from retrodiff.builder import Builder, preset
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    NeighborEmbeddings,
    Noised,
    QueryAndNeighbors,
    QueryOnly,
    QueryVector,
    Unconditional,
    VectorTokens,
)
from retrodiff.encoders import Regions
from retrodiff.interfaces import (
    Autoencoder,
    Database,
    Encoder,
    Prior,
    ProposalDistribution,
    TextEncoder,
    unit,
)
from retrodiff.networks.dit import DiT
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet


class Sizes(TypedDict, total=False):
    """Numbers of the small network; all have defaults.

    Attributes:
        latent: (c, h, w), square; 8x8 gray pictures by default.
        channels: of the first level, a multiple of 32; 32.
        multipliers: channels of each level as a multiple of those; (1, 2).
        sigma_data: standard deviation of the latents; 0.75, that of scanned digits.
        autoencoder: from pictures to latents; None: pictures are latents.
    """

    latent: tuple[int, int, int]
    channels: int
    multipliers: tuple[int, ...]
    sigma_data: float
    autoencoder: Autoencoder | None


@preset
def ldm(*, encoder: Encoder | None = None, **sizes: Unpack[Sizes]) -> Builder:
    """Latent diffusion (Rombach et al. 2022): no retrieval, the parametric baseline.

    Without an encoder it is unconditional. With ``ClassNames(...)`` it is class-conditional, with a
    text encoder text-conditional: the embedding is the only token. Train it with
    ``TrainingSet.alone(images, embeddings)``.

    Args:
        encoder: of what conditions; None: nothing does.
        sizes: see `Sizes`.
    """
    if encoder is None:
        return _small({}, None, sizes).conditioner(Unconditional()).guidance(ClassifierFree(1.0))
    return (
        _small({"query": encoder.dim}, None, sizes)
        .encoder(encoder)
        .conditioner(Dropped(QueryOnly("raw"), 0.1))
        .defaults(prompt_template="{}")
    )


@preset
def knn_diffusion(
    *, encoder: Encoder, database: Database | None = None, k: int = 10, **sizes: Unpack[Sizes]
) -> Builder:
    """kNN-Diffusion (Sheynin et al. 2022): the query itself and its k neighbors, two streams.

    Trained on images alone, whose own embedding is the query; asked with text. Each stream is
    dropped by itself in a tenth of the samples, and both together in another.

    Args:
        encoder: of images and text in one space.
        database: D; None: to be set before anything is retrieved.
        k: neighbors.
        sizes: see `Sizes`.
    """
    conditioner = QueryAndNeighbors("unit")
    for stream in ("query", "neighbors", None):
        conditioner = Dropped(conditioner, 0.1, stream)
    return (
        _small(dict.fromkeys(("query", "neighbors"), encoder.dim), None, sizes)
        .encoder(encoder)
        .conditioner(conditioner)
        .defaults(k=k)
        .set(database=database)
    )


@preset
def instance_conditioned(
    *,
    encoder: Encoder,
    database: Database | None = None,
    proposal: ProposalDistribution | None = None,
    **sizes: Unpack[Sizes],
) -> Builder:
    """IC-GAN's idea as diffusion (Casanova et al. 2021): an instance stands for its neighborhood.

    The condition is one image's embedding, the target a random one of its 50 neighbors, itself
    excluded: ``TrainingSet.of(...).paired(Pairing.from_table(table))``. Ask with ``images=``, or
    with ``n=`` for instances of the database.

    Args:
        encoder: of the instances.
        database: of instances to draw; None: only images are asked with.
        proposal: which ones, such as ``Instances.fit(database, 50)``.
        sizes: see `Sizes`.
    """
    return (
        _small({"query": encoder.dim}, None, sizes)
        .encoder(encoder)
        .conditioner(Dropped(QueryOnly("unit"), 0.1))
        .set(database=database, proposal=proposal)
    )


@preset
def region_retrieval(
    *,
    encoder: Encoder,
    database: Database | None = None,
    side: int = 2,
    k: int = 4,
    **sizes: Unpack[Sizes],
) -> Builder:
    """RETRO's chunked attention on images, as RISSOLE: each region attends to its own neighbors.

    Borgeaud et al. 2022; Mukherjee et al. 2024. A region's query is its block of the image. Ask
    with ``images=``; with ``reretrieve=[...]``, regions of the estimate ask again while sampling.

    Args:
        encoder: of blocks.
        database: of blocks, as ``Regions(encoder, side).blocks(images)`` cuts them.
        side: regions along each side.
        k: neighbors of each region.
        sizes: see `Sizes`.
    """
    return (
        _small({"neighbors": encoder.dim}, None, sizes)
        .encoder(Regions(encoder, side))
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .defaults(k=k)
        .set(database=database)
    )


@preset
def unclip(
    *,
    encoder: Encoder,
    prior: Prior | None = None,
    tokens: int = 4,
    noise: float = 0.3,
    **sizes: Unpack[Sizes],
) -> Builder:
    """Decodes an image embedding, which a prior draws from text: unCLIP (Ramesh et al. 2022).

    The embedding is added to the timestep embedding and makes ``tokens`` extra tokens. Asked with
    ``images=``, it draws variations of them; with ``query=interpolated(...)``, what lies between
    two.

    Args:
        encoder: of images and text in one space.
        prior: from text to image embeddings, see `unclip_prior`; None: text embeddings are decoded
            as they are.
        tokens: made of an embedding.
        noise: most noise on embeddings in training, as a share of their norm.
        sizes: see `Sizes`.
    """
    width = 64

    def conditioner() -> Dropped:
        vector = Noised(QueryVector(Unconditional(), "unit"), noise)
        return Dropped(VectorTokens(vector, dim=encoder.dim, tokens=tokens, width=width), 0.1)

    return (
        _small({"query": width}, encoder.dim + 1, sizes)
        .encoder(encoder)
        .conditioner(conditioner)
        .set(prior=prior)
    )


@preset
def unclip_prior(
    *, encoder: TextEncoder, embeddings: Tensor, width: int = 128, depth: int = 4
) -> Builder:
    """The prior of `unclip`: a model whose images are embeddings (d, 1, 1), asked with text.

    Train it on ``TrainingSet.alone(unit(embeddings)[:, :, None, None], texts)``, the embeddings of
    images and those of their captions; ``DiffusionPrior(model.diffusion())`` is then the prior.

    Args:
        encoder: of text; that of `unclip`.
        embeddings: (n, d) of training images, to whiten by.
        width: of the network.
        depth: its blocks.
    """
    d = encoder.dim
    space = PrincipalPatches.fit(unit(embeddings)[:, :, None, None], patch=1, components=d)

    def denoiser() -> EDMDenoiser:
        network = DiT(
            shape=(d, 1, 1), patch=1, width=width, depth=depth, heads=4, widths={"query": d}
        )
        return EDMDenoiser(network, sigma_data=1.0, mean=-0.4, sigma_min=0.01, sigma_max=40.0)

    return (
        Builder()
        .encoder(encoder)
        .conditioner(Dropped(QueryOnly("unit"), 0.1))
        .autoencoder(space)
        .denoiser(denoiser)
        .sampler(DPMpp2M())
        .defaults(steps=16)
    )


def _small(widths: dict[str, int], vector: int | None, sizes: Sizes) -> Builder:
    """The network that all relatives have in common, for these streams and this vector."""
    channels, side, breadth = sizes.get("latent", (1, 8, 8))
    if side != breadth:
        raise ValueError(f"latent={(channels, side, breadth)} is not square: give (c, side, side)")
    if len(different := set(widths.values())) > 1:
        raise ValueError(f"the streams have widths {widths}: {sorted(different)} must be one")

    def denoiser() -> EDMDenoiser:
        network = UNet(
            in_channels=channels,
            out_channels=channels,
            size=side,
            channels=sizes.get("channels", 32),
            multipliers=sizes.get("multipliers", (1, 2)),
            blocks_per_level=1,
            attention_factors=(2,),
            context_width=next(iter(widths.values()), None),
            streams=tuple(widths) or ("neighbors",),
            vector_width=vector,
        )
        return EDMDenoiser(
            network,
            sigma_data=sizes.get("sigma_data", 0.75),
            mean=-0.8,
            sigma_min=0.02,
            sigma_max=20.0,
        )

    recipe = Builder().denoiser(denoiser).sampler(DPMpp2M()).guidance(ClassifierFree(2.0))
    space = sizes.get("autoencoder")
    recipe = recipe.defaults(steps=10)
    return recipe if space is None else recipe.autoencoder(space)
