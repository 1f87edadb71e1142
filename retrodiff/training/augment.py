"""Augmentation of training images; `Mirrored` and `Moved` cannot leak into samples.

A shifted or smaller picture on a plain background of the same color, and the mirror image of a
picture without letters, are as good as the original, so a network that draws them is not wrong.
What changes the distribution (rotations, cut-outs, colors) would have to be told to the network
(Karras et al. 2022, appendix F.2): `ShiftScaleColor` is for encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.numbers import real, whole
from retrodiff.pictures.converting import CHANNELS
from retrodiff.randomness import uniform


@runtime_checkable
class Augmentation(Protocol):
    """Changes training images, each by randomness of its own.

    Examples:
        >>> import torch
        >>> from retrodiff.randomness import uniform
        >>> from retrodiff.training import Augmentation
        >>> class Darker(Augmentation):
        ...     def __call__(self, images, generator):
        ...         by = uniform(generator, (len(images), 1, 1, 1)).to(images)
        ...         return (images - 0.2 * by).clamp(-1, 1)
        >>> Darker()(torch.zeros(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> changed ones of the same shape.

        Args:
            images: of a step.
            generator: draw with ``retrodiff.randomness.uniform(generator, (b, ...))``, so that an
                image does not depend on the others of its batch.
        """
        ...


@dataclass(frozen=True)
class Mirrored:
    """Mirror images, left to right: for pictures without letters and handedness.

    Args:
        probability: of each image being mirrored.

    Examples:
        >>> import torch
        >>> from retrodiff.training import Mirrored
        >>> images = torch.tensor([[[[0.0, 1.0]]]])
        >>> Mirrored(probability=1.0)(images, torch.Generator()).tolist()
        [[[[1.0, 0.0]]]]
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        real("probability", self.probability, 0, 1)

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images (b, c, h, w) -> some of them mirrored."""
        there = uniform(generator, (len(images), 1))[:, 0] < self.probability
        return torch.where(there.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class Moved:
    """Pictures shifted and made smaller on a background of one color.

    Shifts are whole pixels; scales use bilinear interpolation. Pictures whose border is of another
    color get a visible frame: leave those as they are.

    Args:
        shift: most pixels in each direction.
        smallest: least size in relation to the original, above 0 and up to 1.
        background: value of the color around the picture, -1 to 1; 1 is white.

    Examples:
        >>> import torch
        >>> from retrodiff.training import Moved
        >>> moved = Moved(shift=2, smallest=0.85)
        >>> moved(torch.ones(4, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 32, 32])
    """

    shift: int
    smallest: float = 1.0
    background: float = 1.0

    def __post_init__(self) -> None:
        whole("shift", self.shift, 0)
        real("smallest", self.smallest, above=0, most=1)
        real("background", self.background, -1, 1)

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images (b, c, h, w) -> moved ones."""
        b, _, h, w = images.shape
        drawn = uniform(generator, (b, 3), torch.float64)
        shift = ((2 * self.shift + 1) * drawn[:, :2]).floor() - self.shift
        scale = self.smallest + (1 - self.smallest) * drawn[:, 2]
        down = _source(h, shift[:, 0], scale).to(images)
        right = _source(w, shift[:, 1], scale).to(images)
        grid = torch.stack(
            [right.unsqueeze(1).expand(b, h, w), down.unsqueeze(2).expand(b, h, w)], -1
        )
        mode = "nearest" if self.smallest == 1 else "bilinear"
        moved = torch.nn.functional.grid_sample(
            images - self.background, grid, mode, "zeros", align_corners=False
        )
        return moved + self.background


def augmented(
    augment: tuple[Augmentation, ...], images: Tensor, generator: torch.Generator
) -> Tensor:
    """Images of a step, changed by one augmentation after the other.

    Raises:
        ValueError: they are latents, or one changes the shape.
    """
    if images.shape[1] not in CHANNELS or images.shape[1] == 4:
        raise ValueError(
            f"augment= changes pictures, but the training images are latents of {images.shape[1]} "
            "channels: augment before they are encoded, or leave it out"
        )
    for one in augment:
        changed = one(images, generator)
        if changed.shape != images.shape:
            raise ValueError(
                f"{type(one).__name__} made images {tuple(changed.shape)} of "
                f"{tuple(images.shape)}: keep the shape"
            )
        images = changed
    return images


def _source(size: int, shift: Tensor, scale: Tensor) -> Tensor:
    """Where (b, size) each row or column of the result comes from, from -1 to 1."""
    at = (torch.arange(size, dtype=torch.float64) * 2 + 1) / size - 1
    return (at - 2 * shift.unsqueeze(1) / size) / scale.unsqueeze(1)


@dataclass(frozen=True)
class ShiftScaleColor:
    """Moves, scales and tints each picture of a batch a little; what is bared repeats the border.

    For encoders, which should not care; a diffusion model would draw such pictures.

    Args:
        shift: largest move to each side, as a share of the picture's side.
        scale: largest change of size, up or down, as a share.
        color: largest change of brightness, contrast and each channel's gain, as a share.
        flip: mirror half of the pictures; wrong where left and right mean something, as in letters,
            arrows and clocks.

    Examples:
        >>> import torch
        >>> from retrodiff.training import ShiftScaleColor
        >>> view = ShiftScaleColor(shift=0.1, flip=True)
        >>> view(torch.zeros(4, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 32, 32])
    """

    shift: float = 0.06
    scale: float = 0.15
    color: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("shift", "scale", "color"):
            real(name, getattr(self, name), 0, 0.9)

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> images of the same shape, in [-1, 1]."""
        b, c = images.shape[:2]
        draw = uniform(generator, (b, 6 + c)) * 2 - 1
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
