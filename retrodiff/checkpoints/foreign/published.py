"""Architectures of the published models, and the facts that belong to their checkpoints.

The three models of Blattmann et al. 2022 and of its repository, as their configuration files give
them. `Architecture` also holds what is read from a user's own configuration of that family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from retrodiff.diffusion.schedule import ScaledLinear
from retrodiff.interfaces import Scale
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder

MOST_BLOCKS = 512
"""Of a network that is built from a configuration; the published ones have 12."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model of the published family in numbers.

    Args:
        unet: arguments of `UNet`.
        kind: of the first stage.
        autoencoder: arguments of `VQAutoencoder` or `KLAutoencoder`, ``scale_factor`` among them.
        schedule: of training.
        scale: of the embeddings that the network was trained with; None: the file doesn't say.
        name: which published model this is; None: another one.
        scaled_by_std: ``scale_factor`` was measured in training and is in the checkpoint itself.

    Examples:
        >>> from retrodiff.checkpoints import PUBLISHED
        >>> architecture = PUBLISHED["rdm_imagenet"]
        >>> architecture.kind, architecture.scale, architecture.unet["channels"]
        ('vq', 'raw', 192)
    """

    unet: Mapping[str, Any]
    kind: Literal["vq", "kl"]
    autoencoder: Mapping[str, Any]
    schedule: ScaledLinear
    scale: Scale | None = None
    name: str | None = None
    scaled_by_std: bool = False

    def __post_init__(self) -> None:
        """Refuses networks that no configuration of the family asks for.

        Raises:
            ValueError: one of more than `MOST_BLOCKS` blocks.
        """
        for numbers in (self.unet, self.autoencoder):
            levels, each = len(numbers["multipliers"]), numbers["blocks_per_level"]
            depth = numbers.get("depth", 1)
            if (blocks := levels * (each + 1) * depth) > MOST_BLOCKS:
                raise ValueError(
                    f"an architecture of {levels} levels, {each} blocks each and depth {depth} has "
                    f"{blocks:,} blocks, more than {MOST_BLOCKS:,}: is its configuration damaged?"
                )

    def build(self) -> tuple[UNet, VQAutoencoder | KLAutoencoder]:
        """UNet and first stage with fresh weights; on the meta device under ``torch.device``."""
        return UNet(**self.unet), self.first_stage()

    def first_stage(self) -> VQAutoencoder | KLAutoencoder:
        """The first stage with fresh weights."""
        kind = VQAutoencoder if self.kind == "vq" else KLAutoencoder
        return kind(**self.autoencoder)


class Scaled:
    """What a checkpoint says about the scale of its embeddings, against what is asked for."""

    scale: Scale | None
    source: str

    def agreed_scale(self, asked: Scale | None) -> Scale:
        """The scale of the embeddings, from the checkpoint or else as asked for.

        Raises:
            ValueError: neither says it, or the two contradict each other.
        """
        if self.scale is None and asked is None:
            raise ValueError(
                f"{self.source} does not say whether it was trained on raw or unit embeddings, "
                "and the wrong scale gives bad images without an error: pass scale='raw' (the "
                "paper's 256x256 models) or scale='unit' (the 768x768 model)"
            )
        if self.scale is not None and asked is not None and self.scale != asked:
            raise ValueError(
                f"{self.source} was trained on {self.scale} embeddings, but scale={asked!r} was "
                "asked for: leave scale out"
            )
        return asked or self.scale or "raw"


@dataclass(frozen=True, kw_only=True)
class PublishedModel(Scaled):
    """A checkpoint of the published family: networks with weights, and the facts about them.

    Args:
        unet: predicts the noise.
        autoencoder: images <-> the UNet's latents.
        schedule: of training.
        scale: of the embeddings in the context; None: the checkpoint doesn't say.
        name: which published model its architecture is; None: another one.
        weights: ``ema`` (averaged) or ``raw``; ``unknown`` where the file holds one set unnamed.
        source: the file or folder it was read from.
        classes: (classes, d) the tokens of a class-conditional model; None: it has none, or a
            conditioner that is not read.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.checkpoints import PublishedModel, load_compvis
        >>> from retrodiff.diffusion import ScaledLinear
        >>> from retrodiff.networks import UNet, VQAutoencoder
        >>> published = load_compvis("model.ckpt", preset="rdm_imagenet")  # doctest: +SKIP
        >>> unet = UNet(
        ...     in_channels=3,
        ...     out_channels=3,
        ...     size=8,
        ...     channels=32,
        ...     multipliers=(1,),
        ...     blocks_per_level=1,
        ...     attention_factors=(1,),
        ...     context_width=16,
        ... )
        >>> first_stage = VQAutoencoder(
        ...     channels=32, multipliers=(1,), blocks_per_level=1, latent_channels=3, codes=8
        ... )
        >>> published = PublishedModel(  # the same by hand, small and untrained
        ...     unet=unet,
        ...     autoencoder=first_stage,
        ...     schedule=ScaledLinear(),
        ...     scale="raw",
        ...     name=None,
        ...     weights="unknown",
        ...     source="here",
        ... )
        >>> presets.from_published(published).build().k
        4
    """

    unet: UNet
    autoencoder: VQAutoencoder | KLAutoencoder
    schedule: ScaledLinear
    scale: Scale | None
    name: str | None
    weights: Literal["ema", "raw", "unknown"]
    source: str
    classes: Tensor | None = None

    @property
    def context_width(self) -> int | None:
        """Width of an embedding in the context."""
        return self.unet.context_width

    @property
    def scale_factor(self) -> float:
        """The UNet's latents are the first stage's times this."""
        return self.autoencoder.scale_factor


_PAPER_UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "size": 64,
    "blocks_per_level": 2,
    "attention_factors": [2, 4, 8],
    "context_width": 512,
    "channels_per_head": 32,
}
_PAPER_VQ = {
    "channels": 128,
    "multipliers": [1, 2, 4],
    "blocks_per_level": 2,
    "latent_channels": 3,
    "codes": 8192,
}

PUBLISHED = {
    "rdm_imagenet": Architecture(
        unet={**_PAPER_UNET, "channels": 192, "multipliers": [1, 2, 3, 5]},
        kind="vq",
        autoencoder=_PAPER_VQ,
        schedule=ScaledLinear(0.0015, 0.0195),
        scale="raw",
        name="rdm_imagenet",
    ),
    "rdm_ffhq": Architecture(
        unet={**_PAPER_UNET, "channels": 224, "multipliers": [1, 2, 3, 4]},
        kind="vq",
        autoencoder=_PAPER_VQ,
        schedule=ScaledLinear(0.0015, 0.0195),
        scale="raw",
        name="rdm_ffhq",
    ),
    "rdm_768": Architecture(
        unet={
            "in_channels": 16,
            "out_channels": 16,
            "size": 48,
            "channels": 448,
            "multipliers": [1, 2, 3, 4],
            "blocks_per_level": 2,
            "attention_factors": [1, 2, 4],
            "context_width": 768,
            "channels_per_head": 32,
        },
        kind="kl",
        autoencoder={
            "channels": 128,
            "multipliers": [1, 1, 2, 2, 4],
            "blocks_per_level": 2,
            "latent_channels": 16,
            "attention_factors": [16],
            "scale_factor": 0.22765929,
        },
        schedule=ScaledLinear(0.0015, 0.015),
        scale="unit",
        name="rdm_768",
    ),
}
"""The published models by name."""


def recognized(architecture: Architecture) -> Architecture:
    """Adds name and scale to an architecture whose UNet is that of a published model."""
    for name, known in PUBLISHED.items():
        same = _graph(architecture.unet) == _graph(known.unet)
        if same and architecture.kind == known.kind:
            return replace(architecture, name=name, scale=known.scale)
    return architecture


def _graph(unet: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet computes with its weights, in one form for all ways to say it."""
    names = ("in_channels", "out_channels", "channels", "blocks_per_level", "context_width")
    widths = [multiplier * unet["channels"] for multiplier in unet["multipliers"]]
    attends = [2**level in unet["attention_factors"] for level in range(len(widths))]
    heads = [
        unet.get("heads") or width // unet.get("channels_per_head", 32)
        for width, a in zip(widths, [*attends[:-1], True], strict=True)
        if a
    ]
    return {
        **{name: unet[name] for name in names},
        "widths": widths,
        "attends": attends,
        "heads": heads,
        "depth": unet.get("depth", 1),
    }
