"""Random small changes of training pictures that leave their meaning as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.numbers import real


@dataclass(frozen=True)
class ShiftScaleColor:
    """Moves, scales and tints each picture of a batch a little; what is bared repeats the border.

    Args:
        shift: largest move to each side, as a share of the picture's side.
        scale: largest change of size, up or down, as a share.
        color: largest change of brightness, contrast and each channel's gain, as a share.
        flip: mirror half of the pictures; wrong where left and right mean something, as in letters,
            arrows and clocks.
    """

    shift: float = 0.06
    scale: float = 0.15
    color: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("shift", "scale", "color"):
            real(name, getattr(self, name), 0, 0.9)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> images of the same shape, in [-1, 1]."""
        b, c = images.shape[:2]
        draw = torch.rand(b, 6 + c, generator=generator) * 2 - 1
        size = (1 + self.scale) ** draw[:, 0]
        mirrored = torch.where(draw[:, 1] < 0, -1.0, 1.0) if self.flip else torch.ones(b)
        place = torch.zeros(b, 2, 3)
        place[:, 0, 0], place[:, 1, 1] = mirrored / size, 1 / size
        place[:, :, 2] = draw[:, 2:4] * 2 * self.shift
        grid = F.affine_grid(place, list(images.shape), align_corners=False).to(images)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        tint = (1 + self.color * draw[:, 4:]).to(images)[:, :, None, None]
        contrast, brightness, gain = tint[:, :1], tint[:, 1:2], tint[:, 2:]
        bright = (moved + 1) * brightness * gain - 1
        return (bright * contrast).clamp(-1, 1)
