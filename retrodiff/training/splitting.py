"""Holds some training images out, to measure on them what was learned from the others."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from retrodiff.interfaces import Encoder
from retrodiff.training.grids import name_of
from retrodiff.training.images import Images, digest, embedded
from retrodiff.training.seeds import derived

MOST_HELD_OUT = 1000
"""More images than these make a held-out loss no more certain than it need be."""


class Chosen:
    """Some images of a set, as a set of their own.

    Args:
        images: all of them.
        rows: numbers of the chosen ones (n,).
    """

    def __init__(self, images: Images, rows: Tensor) -> None:
        self.images, self.chosen = images, rows.long()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> images (b, c, h, w)."""
        return self.images[self.chosen[rows]]

    def embed(self, encoder: Encoder, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> embeddings (b, d), as the whole set has them."""
        return embedded(self.images, encoder, self.chosen[rows])

    def name(self, row: int) -> str:
        """What an image is called in the whole set."""
        return name_of(self.images, int(self.chosen[row]))

    def digest(self) -> str:
        """Hash of the whole set and of the choice."""
        found = hashlib.sha256(digest(self.images).encode())
        found.update(self.chosen.contiguous().numpy().data)
        return found.hexdigest()[:32]


def split(images: Images, share: float, seed: int = 0) -> tuple[Images, Images | None]:
    """Training images, and those that are held out; None, where no share is.

    Args:
        images: all of them.
        share: of the images that is held out, 0 up to but not including 1: at least one image,
            at most a thousand, drawn at random.
        seed: of the draw.

    Raises:
        ValueError: no image would be left to train on.
    """
    if not share:
        return images, None
    n = len(images)
    held = min(max(1, round(share * n)), MOST_HELD_OUT)
    if held >= n:
        raise ValueError(
            f"validation={share:g} of {n} image{'' if n == 1 else 's'} leaves none to train on: "
            "give more images, or validation=0"
        )
    order = torch.randperm(n, generator=derived(seed, "held-out images", 0))
    first, rest = order[:held].sort().values, order[held:].sort().values
    return Chosen(images, rest), Chosen(images, first)
