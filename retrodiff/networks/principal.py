"""A first stage without training: the principal components of small patches, whitened.

Each patch of pixels becomes its leading principal components divided by their standard deviations
(Pearson 1901), so that a latent has unit variance in every channel and an error in a channel that
matters little costs little in the picture. Closed form, linear, and good enough for small models.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from retrodiff.interfaces import Autoencoder
from retrodiff.networks.codec import check_latents
from retrodiff.networks.placed import Placed, at_least_float32, check_floating
from retrodiff.precision import full_precision


class PrincipalPatches(Placed, Autoencoder):
    """Images (b, c, h, w) <-> latents (b, components, h / patch, w / patch). Make one with `fit`.

    Images and latents may have any floating dtype. Computed and returned in float32 whatever the
    dtype of the components, autocast or not, and in float64 where they are.

    Args:
        channels: c of the images.
        patch: side of a patch; divides height and width.
        components: kept of each patch's c * patch² numbers.

    Raises:
        ValueError: more ``components`` than numbers in a patch.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import PrincipalPatches
        >>> images = torch.rand(20, 3, 16, 16) * 2 - 1
        >>> first_stage = PrincipalPatches.fit(images, patch=4, components=8)
        >>> (
        ...     first_stage.encode(images).shape,
        ...     first_stage.decode(first_stage.encode(images)).shape,
        ... )
        (torch.Size([20, 8, 4, 4]), torch.Size([20, 3, 16, 16]))
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, *, channels: int, patch: int, components: int) -> None:
        super().__init__()
        width = channels * patch**2
        if not 1 <= components <= width:
            raise ValueError(
                f"components={components}, but a patch has {width} numbers: keep 1 to {width}"
            )
        self.channels, self.patch, self.components = channels, patch, components
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(width)[:components])
        self.register_buffer("scale", torch.ones(components))

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"channels": self.channels, "patch": self.patch, "components": self.components}

    @classmethod
    def fit(cls, images: Tensor, patch: int, components: int) -> PrincipalPatches:
        """The components of all patches of some images (n, c, h, w)."""
        self = cls(channels=images.shape[1], patch=patch, components=components)
        rows = rearrange(self._patches(images), "b f h w -> (b h w) f").double()
        mean = rows.mean(0)
        variance, axes = torch.linalg.eigh((rows - mean).T.cov())
        # Eigenvalues come ascending, and an axis may point either way: make that a convention.
        axes = axes.flip(1)[:, :components]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.basis.copy_(axes.T)
        self.scale.copy_(variance.flip(0)[:components].clamp_min(1e-8).sqrt())
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images -> whitened components.

        Raises:
            ValueError: the images cannot be cut into patches.
        """
        with full_precision():
            mean, basis, scale = self._components()
            centered = self._patches(images).to(mean.dtype) - mean.view(1, -1, 1, 1)
            return torch.einsum("kf,bfhw->bkhw", basis / scale[:, None], centered)

    def decode(self, latents: Tensor) -> Tensor:
        """Whitened components -> the images that they describe."""
        check_latents(latents, self.components)
        with full_precision():
            mean, basis, scale = self._components()
            wide = latents.to(mean.dtype)
            pixels = torch.einsum("kf,bkhw->bfhw", basis * scale[:, None], wide)
            pixels = pixels + mean.view(1, -1, 1, 1)
        return rearrange(pixels, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            at_least_float32(self.mean),
            at_least_float32(self.basis),
            at_least_float32(self.scale),
        )

    def _patches(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch or images.shape[1] != self.channels:
            raise ValueError(
                f"images {tuple(images.shape[1:])} cannot be cut into patches of {self.channels} "
                f"channels and side {self.patch}: resize them to a multiple"
            )
        check_floating(images, "images", "numbers in [-1, 1]: pixels / 127.5 - 1")
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
