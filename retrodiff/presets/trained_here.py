"""Models that one trains at home: a small one for any pictures, and that of the pictograms."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from retrodiff.builder import Builder, preset
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    FlowDenoiser,
    Folded,
    Heun,
    Identity,
    NeighborEmbeddings,
    PixelUnshuffle,
    Pooled,
    PromptAndNeighbors,
    Rescaled,
)
from retrodiff.interfaces import Autoencoder, Database, Encoder, ProposalDistribution, Retriever
from retrodiff.model import Model
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder
from retrodiff.retrieval import NearestNeighbors


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

    return (
        Builder()
        .encoder(encoder)
        .retriever(retriever or NearestNeighbors())
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .autoencoder(first_stage or PixelUnshuffle(patch))
        .denoiser(denoiser)
        .sampler(Heun())
        .guidance(ClassifierFree(1.5))
        .defaults(k=k, steps=12)
        .set(database=database)
    )


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
    """The shipped model: draws pictograms of 64x64 pixels from neighbors in its database.

    A UNet of 3.5 million weights on latents of 4 x 16 x 16, folded to 16 x 8 x 8; EDM
    preconditioning; prompt and neighbors as two streams of tokens, their means and the nearest
    neighbor beside the timestep.

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
    tokens = Rescaled(Pooled(PromptAndNeighbors("unit"), first="neighbors"), width**0.5)

    def denoiser() -> EDMDenoiser:
        network = UNet(
            in_channels=16,
            out_channels=16,
            size=8,
            channels=channels // 3,
            multipliers=(3, 3),
            blocks_per_level=1,
            attention_factors=(1, 2),
            context_width=width,
            streams=("query", "neighbors"),
            vector_width=3 * width,
        )
        return EDMDenoiser(
            network, sigma_data=1.0, mean=0.3, std=1.4, sigma_min=0.01, sigma_max=40.0
        )

    recipe = (
        Builder()
        .retriever(NearestNeighbors())
        .conditioner(Dropped(tokens, 0.1))
        .autoencoder(Folded(first_stage or Identity(), 2))
        .denoiser(denoiser)
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(4.0))
        .defaults(k=k, steps=16, prompt_template="{}")
    )
    return recipe.set(**given)
