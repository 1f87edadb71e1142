"""VQ autoencoder: the first stage of the paper's models, with a codebook.

VQGAN (Esser et al. 2021, arXiv 2012.09841) in the form of Rombach et al. 2022: diffusion runs on
the latent *before* quantization, and decoding quantizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from retrodiff.interfaces import Autoencoder
from retrodiff.networks.blocks import GROUPS
from retrodiff.networks.codec import Decoder, Encoder, check_images, check_latents
from retrodiff.networks.placed import Placed, at_least_float32
from retrodiff.precision import full_precision

ROWS_AT_ONCE = 8192
"""Latent positions compared with the codebook at a time: with 8,192 codes 256 MB in float32."""


class VQAutoencoder(Placed, Autoencoder):
    """Images in [-1, 1] <-> latents, quantized on the way back.

    Images and latents may have any floating dtype. Computed in the weights' dtype (under autocast
    in its own); what is returned is float32, or float64 where the weights are. The nearest codes
    are always found in float32 or better: rounded distances pick other codes.

    The first stage of latent diffusion with a codebook (Esser et al. 2021; Rombach et al. 2022).

    Args:
        channels: channels of the first level.
        multipliers: channels of each level as a multiple of ``channels``; each level but the last
            halves the resolution.
        blocks_per_level: residual blocks of each level; the decoder has one more.
        latent_channels: channels of a latent, width of a code.
        codes: number of codes.
        feature_channels: channels between encoder and latent; None: ``latent_channels``.
        attention_factors: downsampling factors with attention; the middle always has it.
        image_channels: channels of an image.
        groups: of every norm; divides ``channels``.
        scale_factor: latents are the encoder's times this number.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import VQAutoencoder
        >>> first_stage = VQAutoencoder(
        ...     channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=4, codes=64
        ... )
        >>> images = torch.zeros(1, 3, 16, 16)
        >>> first_stage.encode(images).shape, first_stage.codes(images).shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 8, 8]))
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        blocks_per_level: int,
        latent_channels: int,
        codes: int,
        feature_channels: int | None = None,
        attention_factors: Sequence[int] = (),
        image_channels: int = 3,
        groups: int = GROUPS,
        scale_factor: float = 1.0,
    ):
        super().__init__()
        features = latent_channels if feature_channels is None else feature_channels
        self._config = {
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks_per_level": blocks_per_level,
            "latent_channels": latent_channels,
            "codes": codes,
            "feature_channels": features,
            "attention_factors": list(attention_factors),
            "image_channels": image_channels,
            "groups": groups,
        }
        self.image_channels, self.latent_channels = image_channels, latent_channels
        self.scale_factor = scale_factor
        shape = {
            "channels": channels,
            "multipliers": multipliers,
            "blocks_per_level": blocks_per_level,
            "attention_factors": attention_factors,
            "groups": groups,
        }
        self.encoder = Encoder(in_channels=image_channels, out_channels=features, **shape)
        self.to_latent = nn.Conv2d(features, latent_channels, 1)
        self.codebook = nn.Embedding(codes, latent_channels)
        nn.init.uniform_(self.codebook.weight, -1 / codes, 1 / codes)
        self.from_latent = nn.Conv2d(latent_channels, features, 1)
        self.decoder = Decoder(in_channels=features, out_channels=image_channels, **shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``VQAutoencoder(**config)`` is the same architecture."""
        return {**self._config, "scale_factor": self.scale_factor}

    @property
    def factor(self) -> int:
        """Pixels per latent position and side."""
        return 2 ** (len(self.encoder.levels) - 1)

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return self.codebook.num_embeddings

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> latents before quantization (b, latent, h/f, w/f)."""
        check_images(images, self.image_channels, self.factor)
        latents = self.to_latent(self.encoder(images.to(self.dtype))).contiguous()
        return at_least_float32(latents) * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, latent, h, w), quantized -> images (b, c, f*h, f*w) in about [-1, 1]."""
        return self.decode_codes(self.nearest(latents))

    def codes(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> numbers of their codes (b, h/f, w/f)."""
        return self.nearest(self.encode(images))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Numbers of codes (b, h, w) -> images (b, c, f*h, f*w)."""
        return self.decode_vectors(rearrange(self.codebook(codes), "b h w c -> b c h w"))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Codes themselves (b, latent, h, w), without the scale -> images (b, c, f*h, f*w)."""
        return at_least_float32(self.decoder(self.from_latent(vectors.to(self.dtype)))).contiguous()

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents (b, latent, h, w) -> numbers of the nearest codes (b, h, w)."""
        check_latents(latents, self.latent_channels)
        with full_precision():
            book = at_least_float32(self.codebook.weight)
            rows = rearrange(latents.to(book.dtype), "b c h w -> (b h w) c") / self.scale_factor
            # |z - e|^2 less |z|^2, which is the same for all codes.
            norms = book.square().sum(1)
            found = [
                torch.addmm(norms, part, book.T, alpha=-2).argmin(1)
                for part in rows.split(ROWS_AT_ONCE)
            ]
        b, _, h, w = latents.shape
        return rearrange(torch.cat(found), "(b h w) -> b h w", b=b, h=h, w=w)
