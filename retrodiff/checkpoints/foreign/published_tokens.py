"""The published autoregressive models (RARM), and what belongs to their checkpoints.

The three models of Blattmann et al. 2022 have one architecture and differ in what they were trained
on: the ImageNet classes of dogs (151 to 280), of mammals (147 to 388), and of animals (0 to 397).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from retrodiff.checkpoints.foreign.published import Scaled
from retrodiff.interfaces import Scale
from retrodiff.networks.causal import CausalTransformer
from retrodiff.networks.vq import VQAutoencoder


@dataclass(frozen=True, kw_only=True)
class TokenArchitecture:
    """An autoregressive model of the published family in numbers.

    Args:
        transformer: arguments of `CausalTransformer`.
        autoencoder: arguments of `VQAutoencoder`.
        scale: of the embeddings that it was trained with; None: the file doesn't say.
        name: which published model this is; None: another one, or a file that doesn't say.

    Examples:
        >>> from retrodiff.checkpoints import PUBLISHED_TOKENS
        >>> architecture = PUBLISHED_TOKENS["rarm_dogs"]
        >>> architecture.transformer["depth"], architecture.transformer["codes"]
        (18, 16384)
    """

    transformer: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    scale: Scale | None = None
    name: str | None = None

    def build(self) -> tuple[CausalTransformer, VQAutoencoder]:
        """Transformer and first stage with fresh weights; on meta under ``torch.device``."""
        return CausalTransformer(**self.transformer), VQAutoencoder(**self.autoencoder)

    def recognized(self) -> TokenArchitecture:
        """With the scale of the published models, if its transformer is theirs."""
        known = PUBLISHED_TOKENS["rarm_dogs"]
        same = dict(self.transformer) == dict(known.transformer)
        return replace(self, scale=known.scale) if same else self


@dataclass(frozen=True, kw_only=True)
class PublishedTransformer(Scaled):
    """An autoregressive checkpoint of the published family, with weights and facts.

    Args:
        transformer: predicts codes.
        autoencoder: images <-> codes.
        scale: of the embeddings in the context; None: the checkpoint doesn't say.
        name: which published model it was loaded as; None: the file doesn't say.
        weights: these files hold one set, those of the last step.
        source: the file it was read from.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.checkpoints import PublishedTransformer, load_compvis
        >>> from retrodiff.networks import CausalTransformer, VQAutoencoder
        >>> published = load_compvis("model.ckpt", preset="rarm_dogs")  # doctest: +SKIP
        >>> network = CausalTransformer(
        ...     codes=8, grid=(4, 4), width=32, depth=1, heads=2, context_width=16
        ... )
        >>> first_stage = VQAutoencoder(
        ...     channels=32, multipliers=(1,), blocks_per_level=1, latent_channels=3, codes=8
        ... )
        >>> published = PublishedTransformer(  # the same by hand, small and untrained
        ...     transformer=network,
        ...     autoencoder=first_stage,
        ...     scale="raw",
        ...     name=None,
        ...     weights="raw",
        ...     source="here",
        ... )
        >>> presets.from_published(published).build().k
        4
    """

    transformer: CausalTransformer
    autoencoder: VQAutoencoder
    scale: Scale | None
    name: str | None
    weights: Literal["raw"]
    source: str


_ARCHITECTURE = TokenArchitecture(
    transformer={
        "codes": 16384,
        "grid": (16, 16),
        "width": 768,
        "depth": 18,
        "heads": 12,
        "context_width": 512,
        "extra_tokens": 2,
    },
    autoencoder={
        "channels": 128,
        "multipliers": [1, 1, 2, 2, 4],
        "blocks_per_level": 2,
        "latent_channels": 256,
        "feature_channels": 256,
        "attention_factors": [16],
        "codes": 16384,
        "image_channels": 3,
    },
    scale="raw",
)

PUBLISHED_TOKENS = {
    name: replace(_ARCHITECTURE, name=name)
    for name in ("rarm_dogs", "rarm_mammals", "rarm_animals")
}
"""The published autoregressive models by name."""
