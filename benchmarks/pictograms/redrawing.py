"""Random changes that make a pictogram look as if another hand had drawn it.

An encoder that has seen three styles takes them for the world. Dark outlines, flat areas, thin or
missing colors and blur are what styles differ in while the thing stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from retrodiff.training import ShiftScaleColor

MARGIN = 8


@dataclass(frozen=True)
class Redrawn:
    """Each change happens to its share of the pictures of a batch, independently.

    Args:
        outlined: dark lines where colors change.
        flattened: few levels of brightness, after a little blur.
        faded: less color, down to gray.
        tint: largest change of each channel's darkness, for all; white stays white.
        moved: shift and scale, for all; what comes in from outside is white.
    """

    outlined: float = 0.35
    flattened: float = 0.3
    faded: float = 0.2
    tint: float = 0.25
    moved: ShiftScaleColor = field(default_factory=lambda: ShiftScaleColor(0.05, 0.2, 0.0))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (b, 3, h, w) in [-1, 1] -> images of the same shape, in [-1, 1]."""
        b = len(images)
        happens = torch.rand(3, b, 1, 1, 1, generator=generator)
        strength = torch.rand(3, b, 1, 1, 1, generator=generator)
        channel = torch.rand(b, 3, 1, 1, generator=generator) * 2 - 1
        smooth = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        levels = (2 + 4 * strength[0]).round()
        flat = ((smooth + 1) / 2 * levels).round() / levels * 2 - 1
        x = torch.where(happens[0] < self.flattened, flat, images)
        gray = images.mean(1, keepdim=True)
        x = torch.where(happens[1] < self.faded, gray + (x - gray) * strength[1], x)
        x = 1 - ((1 - x) * (1 + self.tint * channel)).clamp(0, 2)
        edge = (max_pool2d(images, 3, 1, 1) - images).amax(1, keepdim=True)
        line = ((edge - 0.4) * (1 + 2 * strength[2])).clamp(0, 1)
        x = torch.where(happens[2] < self.outlined, x * (1 - line) - line, x)
        around = MARGIN
        wide = pad(x, (around,) * 4, value=1.0)
        return self.moved(wide, generator)[:, :, around:-around, around:-around]
