"""Slightly changed copies of images, planted to see whether a copying report would find them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from retrodiff.pictures.converting import to_bytes, to_float, to_image


def crop(image: Tensor, generator: Generator) -> Tensor:
    """Loses a tenth of width and height at a random side, and is enlarged again."""
    h, w = image.shape[-2:]
    high, wide = max(1, round(0.9 * h)), max(1, round(0.9 * w))
    top = int(torch.randint(h - high + 1, (), generator=generator))
    left = int(torch.randint(w - wide + 1, (), generator=generator))
    return _resized(image[:, top : top + high, left : left + wide], h, w)


def noise(image: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise of 5 % of the range."""
    return image + 0.1 * torch.randn(image.shape, generator=generator)


def blur(image: Tensor, generator: Generator) -> Tensor:
    """Two thirds of the resolution."""
    h, w = image.shape[-2:]
    return _resized(_resized(image, max(1, 2 * h // 3), max(1, 2 * w // 3)), h, w)


def color(image: Tensor, generator: Generator) -> Tensor:
    """Contrast by up to 15 %, each channel brighter or darker by up to 7.5 % of the range."""
    gain, offset = (torch.rand(n, 1, 1, generator=generator) - 0.5 for n in (1, 3))
    return image * (1 + 0.3 * gain) + 0.3 * offset


def shift(image: Tensor, generator: Generator) -> Tensor:
    """Moved by up to a sixteenth of its size; what leaves on one side enters on the other."""
    h, w = image.shape[-2:]
    by = [int(torch.randint(-(n // 16), n // 16 + 1, (), generator=generator)) for n in (h, w)]
    return image.roll(by, (1, 2))


def jpeg(image: Tensor, generator: Generator) -> Tensor:
    """Compressed by JPEG at quality 50."""
    from PIL import Image

    file = io.BytesIO()
    pixels = to_bytes(image.clamp(-1, 1)).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return to_float(to_image(file.getvalue()))


def mirror(image: Tensor, generator: Generator) -> Tensor:
    """Left and right exchanged."""
    return image.flip(-1)


KINDS: Mapping[str, Callable[[Tensor, Generator], Tensor]] = {
    f.__name__: f for f in (crop, noise, blur, color, shift, jpeg, mirror)
}
"""Ways to change a copy, by name; each takes an image (3, h, w) in [-1, 1]."""


def plant(image: Tensor, kind: str, generator: Generator) -> Tensor:
    """A copy (3, h, w) in [-1, 1] of an image, changed in one of the `KINDS`.

    Args:
        image: (c, h, w) in [-1, 1], c = 1 or 3.
        kind: of the change.
        generator: of its random numbers.
    """
    return KINDS[kind](image.expand(3, -1, -1), generator).clamp(-1, 1)


def _resized(image: Tensor, h: int, w: int) -> Tensor:
    return interpolate(image[None], (h, w), mode="bicubic", antialias=True)[0]
