"""Pictures redrawn as outlines with few flat colors: a style that no training set has.

An encoder that has seen only shaded or flat pictures without contours takes a drawing with contours
for something else. Some of its training pictures are redrawn, so that it finds concepts in line
drawings too, without having seen one (OpenMoji is such a set).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.randomness import uniform
from retrodiff.training import Augmentation


@dataclass(frozen=True)
class Outlined:
    """Some pictures get dark contours and flat, sometimes no, colors; then the next augmentation.

    Args:
        then: applied to all of them afterwards.
        probability: of a picture being redrawn.
    """

    then: Augmentation
    probability: float = 0.3

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (b, 3, h, w) in [-1, 1] on white -> some of them redrawn."""
        drawn = uniform(generator, (len(images), 4)).to(images.device)
        redrawn = outline(images, 0.25 + 0.5 * drawn[:, 0], 2 + 3 * drawn[:, 1], drawn[:, 2])
        there = (drawn[:, 3] < self.probability).view(-1, 1, 1, 1)
        return self.then(torch.where(there, redrawn, images), generator)


def outline(images: Tensor, threshold: Tensor, levels: Tensor, white: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] -> their contours in black over few colors.

    Args:
        images: on a white ground.
        threshold: (b,) differences of color that make a contour, 0 to 2.
        levels: (b,) values that a color channel keeps, rounded.
        white: (b,) how far colors fade to white: above 0.75 altogether, below 0.5 not at all.
    """
    t, n, w = (v.view(-1, 1, 1, 1) for v in (threshold, levels.round(), white))
    padded = F.pad(images, (1, 1, 1, 1), value=1.0)
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs()
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs()
    edge = torch.maximum(across, down).amax(1, keepdim=True)
    line = ((edge - t) * 4).clamp(0, 1)
    flat = ((images + 1) / 2 * n).round() / n * 2 - 1
    fade = ((w - 0.5) * 4).clamp(0, 1)
    flat = flat + (1 - flat) * fade
    return flat * (1 - line) - line
