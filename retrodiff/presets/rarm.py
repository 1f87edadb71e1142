"""The paper's autoregressive models."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, Unpack

from retrodiff.autoregressive import AutoregressiveGenerator
from retrodiff.builder import Builder, preset
from retrodiff.checkpoints.foreign.published_tokens import PUBLISHED_TOKENS, PublishedTransformer
from retrodiff.diffusion import NeighborEmbeddings
from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import Conditioner, Database, Encoder, ProposalDistribution, Retriever
from retrodiff.presets.published_family import Checkpoint, named, plain_tokens


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


def _rarm(name: str, chosen: ChosenTokens) -> Builder:
    """One of the paper's autoregressive models, and what is chosen."""
    architecture, checkpoint = PUBLISHED_TOKENS[name], chosen.get("checkpoint")
    clip = chosen.get("encoder") or CLIPEncoder("ViT-B-32-quickgelu", "openai", preprocessing="rdm")
    numbers: dict[str, Any] = {
        "guidance": chosen.get("guidance", 1.0),
        "temperature": chosen.get("temperature", 1.0),
        "top_k": chosen.get("top_k", 256),
    }
    published = None
    if checkpoint is not None:
        published = named(name, checkpoint, chosen.get("config"), PublishedTransformer)

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
        plain_tokens(chosen.get("k", 4), architecture.transformer["grid"][0] ** 2)
        .conditioner(NeighborEmbeddings(architecture.scale or "raw"))
        .encoder(clip)
        .generator(generator if published is None else generator())
    )
    for slot in ("retriever", "conditioner", "proposal", "database"):
        if (value := chosen.get(slot)) is not None:
            recipe = getattr(recipe, slot)(value)
    return recipe
