"""A network that tells real patches of images from reconstructed ones.

The patch discriminator of Isola et al. 2017 (arXiv 1611.07004), with group normalization in place
of batch normalization, so that it keeps no statistics and does not depend on the batch size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from retrodiff.networks.blocks import GROUPS, check_channels
from retrodiff.networks.normalization import GroupNorm
from retrodiff.networks.placed import Placed

SLOPE = 0.2


class PatchDiscriminator(Placed):
    """Images (b, c, h, w) -> one number for each patch (b, 1, h', w'), above zero for real ones.

    PatchGAN (Isola et al. 2017), as first stages are trained with it (Esser et al. 2021).

    Args:
        image_channels: c.
        channels: of the first level, a multiple of 32; doubled at each further one, up to 8 times.
        levels: how often the resolution is halved; 3 see patches of 70 pixels, 2 of 34, 1 of 16.

    Raises:
        ValueError: ``levels`` is less than 1.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import PatchDiscriminator
        >>> PatchDiscriminator(channels=32, levels=2)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1, 14, 14])
    """

    def __init__(self, *, image_channels: int = 3, channels: int = 64, levels: int = 3) -> None:
        super().__init__()
        check_channels(channels)
        if levels < 1:
            raise ValueError(f"levels={levels}: the discriminator halves the images at least once")
        self._config = {"image_channels": image_channels, "channels": channels, "levels": levels}
        widths = [min(2**level, 8) * channels for level in range(levels + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        ]
        for level in range(1, levels + 1):
            layers += [
                nn.Conv2d(
                    widths[level - 1],
                    widths[level],
                    4,
                    stride=2 if level < levels else 1,
                    padding=1,
                    bias=False,
                ),
                GroupNorm(GROUPS, widths[level]),
                nn.LeakyReLU(SLOPE),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    @property
    def least(self) -> int:
        """Smallest side of an image that has a patch."""
        return 2 ** self._config["levels"] * 3

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> (b, 1, h', w')."""
        return self.layers(images.to(self.dtype)).float()
