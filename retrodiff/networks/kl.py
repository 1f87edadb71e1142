"""KL autoencoder: the first stage of the 768x768 model.

The KL-regularized autoencoder of Rombach et al. 2022 (arXiv 2112.10752). Its latents are wide, so
the diffusion model sees them times ``scale_factor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from retrodiff.interfaces import Autoencoder
from retrodiff.networks.blocks import GROUPS
from retrodiff.networks.codec import Decoder, Encoder, check_images, check_latents
from retrodiff.networks.placed import Placed, at_least_float32


class KLAutoencoder(Placed, Autoencoder):
    """Images in [-1, 1] <-> latents: the mean of the posterior, times ``scale_factor``.

    Images and latents may have any floating dtype. Computed in the weights' dtype (under autocast
    in its own); what is returned is float32, or float64 where the weights are.

    The first stage of latent diffusion with a Gaussian latent (Rombach et al. 2022).

    Args:
        channels: channels of the first level.
        multipliers: channels of each level as a multiple of ``channels``; each level but the last
            halves the resolution.
        blocks_per_level: residual blocks of each level; the decoder has one more.
        latent_channels: channels of a latent.
        feature_channels: channels between encoder and latent; None: ``latent_channels``.
        attention_factors: downsampling factors with attention; the middle always has it.
        image_channels: channels of an image.
        groups: of every norm; divides ``channels``.
        scale_factor: latents are the encoder's mean times this number, about one over its standard
            deviation: what `encode` returns and `decode` takes is in the diffusion model's space.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import KLAutoencoder
        >>> first_stage = KLAutoencoder(
        ...     channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=4
        ... )
        >>> latents = first_stage.encode(torch.zeros(1, 3, 16, 16))
        >>> latents.shape, first_stage.decode(latents).shape
        (torch.Size([1, 4, 8, 8]), torch.Size([1, 3, 16, 16]))
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        blocks_per_level: int,
        latent_channels: int,
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
        self.encoder = Encoder(in_channels=image_channels, out_channels=2 * features, **shape)
        self.to_latent = nn.Conv2d(2 * features, 2 * latent_channels, 1)
        self.from_latent = nn.Conv2d(latent_channels, features, 1)
        self.decoder = Decoder(in_channels=features, out_channels=image_channels, **shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``KLAutoencoder(**config)`` is the same architecture."""
        return {**self._config, "scale_factor": self.scale_factor}

    @property
    def factor(self) -> int:
        """Pixels per latent position and side."""
        return 2 ** (len(self.encoder.levels) - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) -> mean and log-variance (b, latent, h/f, w/f), without the scale."""
        check_images(images, self.image_channels, self.factor)
        moments = self.to_latent(self.encoder(images.to(self.dtype))).contiguous()
        mean, log_variance = at_least_float32(moments).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> the posterior's mean times ``scale_factor``."""
        return self.moments(images)[0] * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, latent, h, w), scaled -> images (b, c, f*h, f*w) in about [-1, 1]."""
        check_latents(latents, self.latent_channels)
        unscaled = (at_least_float32(latents) / self.scale_factor).to(self.dtype)
        return at_least_float32(self.decoder(self.from_latent(unscaled))).contiguous()
