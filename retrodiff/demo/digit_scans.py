"""The scanned digits: three disjoint sets of scikit-learn's images, and their captions.

Alpaydin & Kaynak 1998: 1,797 scans of 8x8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNSEEN = (8, 9)
"""In D and in the CLIP's training, never in X."""
CAPTION = "a photo of the digit {}"


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) in [-1, 1] and their digits (n,), three disjoint parts."""

    database: tuple[Tensor, Tensor]
    training: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def split(seed: int) -> Split:
    """The scans, shuffled: 700 for D, 550 for X less the unseen digits, the rest held out."""
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 8 - 1
    digits = torch.from_numpy(scans.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    d, x, held = order[:700], order[700:1250], order[1250:]
    x = x[~torch.isin(digits[x], torch.tensor(UNSEEN))]
    return Split(*((images[rows], digits[rows]) for rows in (d, x, held)))


def caption(digit: int) -> str:
    """The caption of a digit, such as "a photo of the digit seven"."""
    return CAPTION.format(WORDS[digit])


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a pixel and slightly noisy."""
    b, _, h, w = images.shape
    wide = F.pad(images, (1, 1, 1, 1), value=-1.0)[:, 0]
    dx, dy = (torch.randint(3, (b,), generator=generator) for _ in range(2))
    rows = (dy[:, None] + torch.arange(h))[:, :, None]
    columns = (dx[:, None] + torch.arange(w))[:, None, :]
    shifted = wide[torch.arange(b)[:, None, None], rows, columns].unsqueeze(1)
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)
