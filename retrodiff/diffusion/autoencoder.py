"""Latent spaces without weights: the pixels themselves, or the pixels folded into channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from retrodiff.interfaces import Autoencoder


@dataclass(frozen=True)
class Identity(Autoencoder):
    """Latents are images.

    Both are (b, c, h, w); images in [-1, 1].

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import Identity
        >>> Identity().encode(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    def encode(self, images: Tensor) -> Tensor:
        """Images as they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as they are."""
        return latents


@dataclass(frozen=True)
class Folded(Autoencoder):
    """The latents of another autoencoder, folded into fewer positions of more channels.

    A network then works on fewer positions, as one that cuts its input into patches does.

    Args:
        autoencoder: makes the latents.
        factor: side of the square of positions that becomes one.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import Folded, Identity
        >>> Folded(Identity(), 2).encode(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    autoencoder: Autoencoder
    factor: int

    @property
    def dtype(self) -> torch.dtype:
        """As the inner autoencoder."""
        return self.autoencoder.dtype

    @property
    def device(self) -> torch.device:
        """As the inner autoencoder."""
        return self.autoencoder.device

    def encode(self, images: Tensor) -> Tensor:
        """Images -> (b, c * factor², h / factor, w / factor) of latents (b, c, h, w)."""
        return PixelUnshuffle(self.factor).encode(self.autoencoder.encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return self.autoencoder.decode(PixelUnshuffle(self.factor).decode(latents))


@dataclass(frozen=True)
class PixelUnshuffle(Autoencoder):
    """Each square of pixels becomes one position with more channels; exact (Shi et al. 2016).

    Args:
        factor: side of the square; divides height and width.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import PixelUnshuffle
        >>> PixelUnshuffle(4).encode(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 48, 8, 8])
    """

    factor: int

    def encode(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c * factor², h / factor, w / factor).

        Raises:
            ValueError: ``factor`` does not divide height or width.
        """
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} cannot be folded by "
                f"factor={self.factor}: crop or resize them to a multiple"
            )
        pattern = "b c (h p) (w q) -> b (c p q) h w"
        return rearrange(images, pattern, p=self.factor, q=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`."""
        pattern = "b (c p q) h w -> b c (h p) (w q)"
        return rearrange(latents, pattern, p=self.factor, q=self.factor)
