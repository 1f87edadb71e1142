"""unCLIP's diffusion prior: draws the embedding of an image that a text may describe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.diffusion.conditioner import QueryOnly
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.interfaces import Neighbors, Prior, Query, unit
from retrodiff.numbers import real, whole
from retrodiff.randomness import normal


@dataclass(frozen=True, eq=False)
class DiffusionPrior(Prior):
    """A diffusion model of embeddings (Ramesh et al. 2022, section 2.2).

    An embedding is an image (d, 1, 1) to it. `retrodiff.presets.unclip_prior` builds the model,
    `retrodiff.training.fit` trains it as any other.

    Args:
        generator: ``model.diffusion()`` of that model; takes one stream, ``query``.
        steps: of its sampler.
        draws: embeddings that are drawn for a text, the nearest of which is kept.
        norm: of the embeddings that it gives; their direction is what it draws.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.diffusion import DiffusionPrior
        >>> from retrodiff.encoders import ClassNames
        >>> names = ClassNames(("zero", "one"))
        >>> embeddings = torch.randn(40, 2)
        >>> model = presets.unclip_prior(
        ...     encoder=names, embeddings=embeddings, width=32, depth=1
        ... )
        >>> prior = DiffusionPrior(model.diffusion(), steps=2)
        >>> prior.translate(names.encode_text(["one"])).shape
        torch.Size([1, 2])
    """

    generator: DiffusionGenerator
    steps: int = 16
    draws: int = 2
    norm: float = 1.0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("draws", self.draws)
        real("norm", self.norm, above=0)

    def translate(self, embedding: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embeddings of texts (b, d) -> of images (b, d); see `Prior`.

        Raises:
            ValueError: the embeddings have another width.
        """
        width = self.generator.widths.get("query")
        if embedding.ndim != 2 or embedding.shape[-1] != width:
            raise ValueError(
                f"prompts have embeddings of shape {tuple(embedding.shape)}, but the prior was "
                f"trained on a width of {width}: use the encoder it was trained with"
            )
        query = Query(embedding)
        context = QueryOnly("unit").condition(query, Neighbors.of_query(query))
        context = context.to(self.generator.device)
        drawn: list[Tensor] = []
        for _ in range(self.draws):
            noise = normal(generator, (len(embedding), *self.generator.shape))
            latents = self.generator.generate(
                context,
                context.zeros(),
                noise.to(self.generator.device),
                steps=self.steps,
                generator=generator,
            )
            drawn.append(unit(self.generator.autoencoder.decode(latents).flatten(1)))
        found = torch.stack(drawn, 1).to(embedding)
        nearest = torch.einsum("bnd,bd->bn", found, embedding).argmax(1)
        return self.norm * found[torch.arange(len(found)), nearest]
