"""How well an autoencoder gives images back: PSNR, SSIM, and how its codes are used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from retrodiff.components import evaluating, where
from retrodiff.interfaces import Autoencoder
from retrodiff.precision import full_precision

WINDOW, SIGMA = 11, 1.5
"""Side and deviation of the Gaussian window of SSIM."""

RANGE = 2.0
"""Of pixels in [-1, 1]."""


@dataclass(frozen=True)
class Reconstruction:
    """What is left of images after encoding and decoding.

    Args:
        psnr: of each image (n,), in dB; infinite where nothing is lost.
        ssim: of each image (n,), at most 1.
        rmse: root mean squared error of all pixels, which lie in [-1, 1].
        l1: mean absolute error of all pixels.
        latent_std: of all latents, about their mean.
        images: a few reconstructions (m, c, h, w) in [-1, 1].

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import PixelUnshuffle
        >>> from retrodiff.evaluation import reconstruction
        >>> result = reconstruction(PixelUnshuffle(2), torch.rand(4, 3, 32, 32) * 2 - 1)
        >>> result.rmse, result.ssim.shape
        (0.0, torch.Size([4]))
    """

    psnr: Tensor
    ssim: Tensor
    rmse: float
    l1: float
    latent_std: float
    images: Tensor

    def __len__(self) -> int:
        return len(self.psnr)

    def __str__(self) -> str:
        return (
            f"{len(self)} images: PSNR {float(self.psnr.mean()):.2f} dB, SSIM "
            f"{float(self.ssim.mean()):.4f}, rmse {self.rmse:.4f} of {RANGE:g}, latents' standard "
            f"deviation {self.latent_std:.3f}"
        )

    def numbers(self) -> dict[str, float]:
        """The means by name, for JSON."""
        return {
            "images": len(self),
            "psnr": float(self.psnr.mean()),
            "ssim": float(self.ssim.mean()),
            "rmse": self.rmse,
            "l1": self.l1,
            "latent_std": self.latent_std,
        }


@torch.no_grad()
def reconstruction(
    autoencoder: Autoencoder, images: Any, *, batch_size: int = 64, shown: int = 64
) -> Reconstruction:
    """Encodes images, decodes them, and compares, in float32.

    Args:
        autoencoder: any first stage.
        images: (n, c, h, w) in [-1, 1] or bytes, or what gives such for row numbers; images that it
            was not trained on, or the numbers say little.
        batch_size: images at a time.
        shown: reconstructions that are returned, of the first images.

    Raises:
        ValueError: there are no images, or they are smaller than SSIM's window of 11 pixels.
    """
    from retrodiff.pictures.converting import to_float

    if not len(images):
        raise ValueError("there are no images to be reconstructed: give at least one")
    device, kind = where(autoencoder) or (torch.device("cpu"), torch.float32)
    psnrs, ssims, kept = list[Tensor](), list[Tensor](), list[Tensor]()
    squares, absolute, numbers = 0.0, 0.0, 0
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(autoencoder), full_precision():
        for rows in torch.arange(len(images)).split(batch_size):
            real = images[rows]
            real = to_float(real) if real.dtype == torch.uint8 else real.float()
            latents = autoencoder.encode(real.to(device, kind))
            made = autoencoder.decode(latents).float().clamp(-1, 1).cpu()
            wide = latents.double().cpu()
            sums += torch.stack([torch.tensor(wide.numel()), wide.sum(), wide.square().sum()])
            real = real.cpu()
            psnrs.append(psnr(real, made))
            ssims.append(ssim(real, made))
            squares += float((real - made).double().square().sum())
            absolute += float((real - made).double().abs().sum())
            numbers += real.numel()
            if sum(map(len, kept)) < shown:
                kept.append(made)
    count, total, square = sums.tolist()
    return Reconstruction(
        torch.cat(psnrs),
        torch.cat(ssims),
        math.sqrt(squares / numbers),
        absolute / numbers,
        math.sqrt(max(0.0, square / count - (total / count) ** 2)),
        torch.cat(kept)[:shown],
    )


def comparison_sheet(originals: Tensor, made: Tensor, columns: int = 12) -> Tensor:
    """Lines of originals, each above a line of their reconstructions, as one picture.

    Args:
        originals: (n, c, h, w) in [-1, 1].
        made: their reconstructions.
        columns: images in a line.

    Returns:
        (c, height, width) in [-1, 1], white where a last line is not full.
    """
    n, c, h, w = originals.shape
    columns = min(columns, n)
    lines = -(-n // columns)
    sheet = originals.new_ones(lines * columns, 2, c, h, w)
    sheet[:n, 0], sheet[:n, 1] = originals, made
    return rearrange(sheet, "(l x) two c h w -> c (l two h) (x w)", l=lines)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images (b,), in dB.

    ``10 log10(range² / mean squared error)`` with the range 2.

    Args:
        one: (b, c, h, w) in [-1, 1].
        other: as many.
    """
    error = (one.double() - other.double()).square().flatten(1).mean(1)
    return 10 * (RANGE**2 / error).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each pair of images (b,), at most 1 (Wang et al. 2004).

    Computed in each channel with a Gaussian window of 11 pixels (deviation 1.5) wherever it fits
    into the image, with K1 = 0.01 and K2 = 0.03, and averaged.

    Args:
        one: (b, c, h, w) in [-1, 1].
        other: as many.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(one.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images of {one.shape[-2]}x{one.shape[-1]} are smaller than SSIM's window of {WINDOW} "
            "pixels: give larger ones"
        )
    channels = one.shape[1]
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(channels, 1, -1, -1).to(one.device)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    x, y = one.double(), other.double()
    at_x, at_y = mean(x), mean(y)
    of_x, of_y = mean(x * x) - at_x**2, mean(y * y) - at_y**2
    both = mean(x * y) - at_x * at_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    same = (2 * at_x * at_y + c1) * (2 * both + c2)
    found = same / ((at_x**2 + at_y**2 + c1) * (of_x + of_y + c2))
    return found.flatten(1).mean(1)
